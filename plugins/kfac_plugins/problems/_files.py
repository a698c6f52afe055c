"""A user's own file or folder: where it is looked for and how it is written down. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kfacore.errors import ConfigError, DataError
from kfacore.lab.data.places import search_folders, user_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["find_file", "from_the_root"]


def find_file(file: str, data_dir: str | None, *, needed: str) -> Path:
    """The file or folder itself, or a relative name below ``data_dir`` or ``KFAC_DATA``.

    Args:
        file: What the user wrote.
        data_dir: The folder of data files, if one is named.
        needed: What to say if nothing is.

    Raises:
        ConfigError: No file is named.
        DataError: It is in none of these folders.
    """
    if not file:
        raise ConfigError(needed)
    path = Path(file).expanduser()
    # the cache is this program's own place, no place for the user's files
    folders: Sequence[Path] = [Path(), *(folder for folder in search_folders(data_dir) if folder != user_cache())]
    for folder in folders:
        if (folder / path).exists():
            return folder / path
    places = "" if path.is_absolute() else f" in {', '.join(str(folder.absolute()) for folder in folders)}"
    raise DataError(f"{path}: no such file{places}; name it with --set problem.file=FILE")


def from_the_root(file: str) -> str:
    """A file's name from the root if it is in the working folder, so that a run can go on from elsewhere."""
    path = Path(file).expanduser()
    return str(path.absolute()) if file and path.exists() else file
