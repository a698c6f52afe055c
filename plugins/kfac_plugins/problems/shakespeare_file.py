"""The text known as tinyshakespeare: finding, verifying, fetching. Imports no torch.

1,115,394 characters of Shakespeare's plays, 65 distinct ones, put together by Andrej Karpathy ("The unreasonable
effectiveness of recurrent neural networks", 2015). No server that has it under a promise to keep it is known, so none
is built in: fetching needs ``--mirror``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kfac_plugins.problems._files import find_file
from kfacore.errors import ConfigError, DataError
from kfacore.lab.data.checksum import sha256_of_file
from kfacore.lab.data.fetch import RemoteFile, fetch, mirrors_from
from kfacore.lab.data.places import search_folders
from kfacore.lab.data.status import DataStatus, Progress

__all__ = ["CHARACTERS", "FILE", "fetch_shakespeare", "find_shakespeare", "is_standard", "shakespeare_status"]

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The characters of the text, in the order of their numbers."""

FILE = RemoteFile("input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
"""The file as its author calls it."""

_NAMES = ("tinyshakespeare.txt", "shakespeare.txt", "shakespeare/input.txt", "tinyshakespeare/input.txt")
_WHAT = "tinyshakespeare: plays of Shakespeare in one text, 1,115,394 characters"
_WHERE = (
    "people get it, as input.txt, from the folder data/tinyshakespeare of Andrej Karpathy's repository char-rnn, and "
    "from most collections of data sets for language models"
)
_ADVICE = (
    f"{_WHERE}; name it with --set problem.file=FILE, put it as {_NAMES[0]} into a folder named by --data-dir or "
    "KFAC_DATA, or run 'kfac data fetch shakespeare --mirror URL' with the address of a folder that has it"
)


def find_shakespeare(file: str, data_dir: str | None) -> Path:
    """The file that is named, or the first of the usual names in ``data_dir``, ``KFAC_DATA`` and the cache.

    Raises:
        DataError: There is none; the message says where people get it.
    """
    if file:
        return find_file(file, data_dir, needed="")
    folders = search_folders(data_dir)
    for folder in folders:
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    places = ", ".join(str(folder) for folder in folders)
    raise DataError(f"the text of the problem 'shakespeare', {_NAMES[0]}, is not in {places}; {_ADVICE}")


def is_standard(path: Path) -> bool:
    """Whether the file is the usual one, byte for byte.

    Raises:
        DataError: It cannot be read.
    """
    return sha256_of_file(path) == FILE.sha256


def fetch_shakespeare(folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
    """Download the file into ``folder/shakespeare``, where `find_shakespeare` looks.

    Args:
        folder: The data folder.
        mirrors: Base addresses; empty for those of ``KFAC_MIRROR``.
        progress: Told about every piece.

    Raises:
        ConfigError: No address is given.
        ResourceError: No network, or the folder cannot be written.
        DataError: Wrong checksum.
    """
    addresses = list(mirrors) or mirrors_from(None, ())
    if not addresses:
        raise ConfigError(
            f"no server is built in for {FILE.name}: give one with --mirror URL or KFAC_MIRROR, the address of a "
            f"folder that has {FILE.name}; {_WHERE}"
        )
    return fetch([FILE], folder / "shakespeare", addresses, progress)


def shakespeare_status(file: str, data_dir: str | None) -> DataStatus:
    """Whether the file is there and right, for ``kfac data list``."""
    try:
        path = find_shakespeare(file, data_dir)
        standard = is_standard(path)
    except DataError as error:
        return DataStatus(_WHAT, "missing", advice=str(error) if file else _ADVICE)
    advice = "" if standard else "not the usual text; to use it all the same set problem.verify=false"
    return DataStatus(_WHAT, "verified" if standard else "unverified", (path,), DataStatus.size_of([path]), advice)
