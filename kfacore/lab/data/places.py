"""Where data files are looked for and where generated ones are kept."""

from __future__ import annotations

import os
from pathlib import Path

from kfacore.errors import DataError

__all__ = ["cache_folder", "named_folder", "search_folders", "user_cache"]


def user_cache() -> Path:
    """The user's cache folder, ``$XDG_CACHE_HOME/kfac`` or ``~/.cache/kfac``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification asks to ignore relative paths.
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "kfac"


def cache_folder(data_dir: str | Path | None = None) -> Path:
    """The folder to write to: ``data_dir``, else the environment variable ``KFAC_DATA``, else the user's cache."""
    chosen = data_dir or os.environ.get("KFAC_DATA")
    return Path(chosen).expanduser() if chosen else user_cache()


def named_folder(data_dir: str | Path) -> Path:
    """A folder that the user named, which must exist: a slip of the pen must not become a new folder.

    Args:
        data_dir: What the user wrote; ``~`` is the home folder.

    Raises:
        DataError: There is no such folder.
    """
    named = Path(data_dir).expanduser()
    if not named.is_dir():
        what = "is not a folder" if named.exists() else "does not exist"
        raise DataError(f"data folder {named} {what}; name an existing one with --data-dir, or leave it out")
    return named


def search_folders(data_dir: str | Path | None = None) -> list[Path]:
    """The folders to look in, best first: ``data_dir``, ``KFAC_DATA``, the user's cache.

    Args:
        data_dir: Folder named by the user.

    Returns:
        Existing or not, without repetition.

    Raises:
        DataError: ``data_dir`` is given and is no folder.
    """
    folders: list[Path] = []
    if data_dir:
        folders.append(named_folder(data_dir))
    environment = os.environ.get("KFAC_DATA")
    if environment:
        folders.append(Path(environment).expanduser())
    folders.append(user_cache())
    return list(dict.fromkeys(folders))
