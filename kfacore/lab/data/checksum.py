"""SHA-256 checksums of files and of arrays."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["sha256_of_arrays", "sha256_of_file"]


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def sha256_of_arrays(*arrays: NDArray[Any]) -> str:
    """SHA-256 (hex) of arrays: their dtypes, shapes and bytes in row-major, little-endian order.

    The layout in memory and the file they came from do not matter, so the same data have the same checksum.
    """
    digest = hashlib.sha256()
    for array in arrays:
        kind = array.dtype.newbyteorder("<")
        digest.update(f"{kind.str.lstrip('<=|')} {array.shape};".encode())
        digest.update(_bytes(array.astype(kind, copy=False)))
    return digest.hexdigest()


def _bytes(array: NDArray[np.generic]) -> memoryview | bytes:
    # hashing the buffer in place saves a copy of the data; a view as bytes needs rows in order and a last axis
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
