"""What a problem can say about its data files without loading them: for ``kfac data list`` and ``kfac data fetch``.

A problem takes part by giving its config model the methods of `ReportsData` and `FetchesData`, which must import torch
neither themselves nor indirectly. A problem without them is listed as having no data of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

__all__ = ["DataStatus", "FetchesData", "Progress", "ReportsData", "State"]

State = Literal["verified", "unverified", "corrupt", "missing", "generated"]

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes so far, and the bytes in all if known."""


@dataclass(frozen=True)
class DataStatus:
    """One set of data.

    Attributes:
        what: What it is, one line.
        state: ``verified`` (checksum right), ``unverified`` (found; there is no checksum to compare with, or none was
            asked for), ``corrupt``, ``missing``, or ``generated`` (not on disk yet, made on first use).
        where: The files found.
        size: Their bytes in all, or None if there are none.
        advice: What to do about a missing or corrupt file; empty if there is nothing to do.
    """

    what: str
    state: State
    where: tuple[Path, ...] = ()
    size: int | None = None
    advice: str = ""

    @staticmethod
    def size_of(paths: Sequence[Path]) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in paths)


@runtime_checkable
class ReportsData(Protocol):
    """A problem's config model that knows its data files."""

    def data_status(self) -> DataStatus:
        """Look for the files and verify their checksums; never raises for missing or corrupt ones."""


@runtime_checkable
class FetchesData(Protocol):
    """A problem's config model that can get its data files."""

    def fetch_data(self, folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
        """Get the files.

        Args:
            folder: Where to put them.
            mirrors: Base addresses to use instead of the usual ones; empty for those.
            progress: Told about every piece that arrives.

        Returns:
            The files, complete and verified.

        Raises:
            ResourceError: No network, no server that has the files, a folder that cannot be written.
            DataError: What arrived is not what was asked for.
        """
