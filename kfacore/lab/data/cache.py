"""Arrays kept on disk: never half-written, verified when read, regenerated when corrupt.

A cache is a convenience: a folder that cannot be written costs time, not the run.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kfacore.errors import DataError
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.npz import read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["cached", "read_cache", "replace_file", "write_cache"]

log = logging.getLogger(__name__)

_CHECKSUM = "sha256"


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name in the same folder and rename it once it is complete and on disk.

    The folder is made if needed. After any error the old file, if there was one, is still there and the temporary one
    is gone.

    Args:
        path: Final name.

    Yields:
        The open temporary file.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile: its files are private to the user, and data folders are shared
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_cache(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Store arrays with their checksum, compressed, atomically.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    import numpy as np

    checksum = np.array(sha256_of_arrays(*(arrays[name] for name in sorted(arrays))))
    members: dict[str, Any] = {**arrays, _CHECKSUM: checksum}
    with replace_file(path) as file:
        np.savez_compressed(file, **members)


def read_cache(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `write_cache` stored and verify its checksum.

    Raises:
        DataError: The file is missing, unreadable, or its checksum does not match.
    """
    arrays = read_npz(path, required=(_CHECKSUM,))
    stored = str(arrays.pop(_CHECKSUM))
    if stored != sha256_of_arrays(*(arrays[name] for name in sorted(arrays))):
        raise DataError(f"{path}: wrong checksum; delete the file, it is made anew when needed")
    return arrays


def cached(
    path: Path, build: Callable[[], dict[str, NDArray[Any]]], *, checksum: str | None = None
) -> dict[str, NDArray[Any]]:
    """Read arrays from the cache, or build and store them.

    A corrupt file is rebuilt and replaced; a folder that cannot be written is reported by a warning of the logger
    ``kfacore.lab.data.cache`` and otherwise does no harm.

    Args:
        path: File of the cache.
        build: Makes the arrays.
        checksum: Known `sha256_of_arrays` of the arrays in order of their names, if there is one.

    Returns:
        The arrays by name.
    """
    if path.exists():
        try:
            arrays = read_cache(path)
            if checksum is None or sha256_of_arrays(*(arrays[name] for name in sorted(arrays))) == checksum:
                return arrays
            log.warning("%s does not hold the expected arrays; making it anew", path)
        except DataError as error:
            log.warning("corrupt cache, making it anew (%s)", error)
    arrays = build()
    try:
        write_cache(path, arrays)
    except OSError as error:
        log.warning(
            "cannot keep %s (%s); going on without it, at the price of making it anew in every run. Set KFAC_DATA to "
            "a folder that can be written",
            path,
            error.strerror or error,
        )
    return arrays
