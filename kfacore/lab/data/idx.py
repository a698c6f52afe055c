"""The idx format of the MNIST files, plain or compressed with gzip.

Layout: two zero bytes, a type code, the number of dimensions, each dimension as a 32-bit big-endian integer, the
entries row by row. Only type 0x08 (unsigned byte) is read, the one MNIST-like sets use.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from kfacore.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["idx_bytes", "parse_idx", "uncompressed"]

_UNSIGNED_BYTE = 0x08


def uncompressed(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: It cannot be read or is corrupt or truncated.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: corrupt or truncated gzip file ({error}); fetch it again") from error


def parse_idx(raw: bytes, where: str) -> NDArray[np.uint8]:
    """Decode an idx file of unsigned bytes.

    Args:
        raw: The whole, uncompressed file.
        where: What to call it in messages.

    Returns:
        The array, in the shape the header states.

    Raises:
        DataError: Wrong magic number, unsupported type, truncated, or bytes left over.
    """
    import numpy as np

    if len(raw) < 4:
        raise DataError(f"{where}: truncated, only {len(raw)} bytes; fetch it again")
    zeros, kind, dimensions = struct.unpack(">HBB", raw[:4])
    if zeros != 0 or kind != _UNSIGNED_BYTE or not 1 <= dimensions <= 4:
        hint = " (gzip data: the name must end in .gz)" if raw[:2] == b"\x1f\x8b" else ""
        raise DataError(
            f"{where}: not an idx file of unsigned bytes, its first bytes are {raw[:4].hex()} and should be 00000801 "
            f"or 00000803{hint}"
        )
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise DataError(f"{where}: truncated in the header, only {len(raw)} bytes; fetch it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    expected = start + math.prod(shape)
    if len(raw) != expected:
        what = "truncated" if len(raw) < expected else "too long"
        raise DataError(
            f"{where}: {what}, {len(raw)} bytes where the header's shape {shape} needs {expected}; fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """Encode an array as an uncompressed idx file, the inverse of `parse_idx`."""
    header = struct.pack(f">HBB{array.ndim}I", 0, _UNSIGNED_BYTE, array.ndim, *array.shape)
    return header + array.tobytes()
