"""Reading .npz files that users bring: no pickles, and a clear message for everything that can be wrong."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import DataError, KfacError, ResourceError, nearest

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

__all__ = ["read_npz"]


def read_npz(
    path: str | Path, required: Collection[str] = (), optional: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Read numeric arrays from a .npz file.

    Args:
        path: The file.
        required: Names that must be in it.
        optional: Further names to read if they are there; None reads everything.

    Returns:
        The arrays by name.

    Raises:
        DataError: No such file, not a .npz file, truncated or corrupt, a required array is missing, or an array
            holds Python objects.
        ResourceError: Not enough memory.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a .npz file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}")
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise DataError(f"{path}: this is a single .npy array; store named arrays with numpy.savez")
            with zipfile.ZipFile(file) as archive:
                return _members(path, archive, required, optional)
    except KfacError:
        raise
    except MemoryError as error:
        raise ResourceError(
            f"{path}: not enough memory to read it; free some, or store less or smaller types"
        ) from error
    except Exception as error:  # a spoiled archive raises almost anything out of zipfile, its decompressors and numpy
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        raise DataError(f"{path}: not a .npz file, or corrupt or truncated ({error}); write it anew") from error


def _members(
    path: Path, archive: zipfile.ZipFile, required: Collection[str], optional: Collection[str] | None
) -> dict[str, NDArray[Any]]:
    members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
    missing = [name for name in required if name not in members]
    if missing:
        raise DataError(f"{path}: has no array '{missing[0]}'; {nearest(missing[0], members) or 'the file is empty'}")
    wanted = members if optional is None else [name for name in members if name in {*required, *optional}]
    # reading the whole member first verifies its checksum before numpy believes a shape in its header
    return {name: _array(path, name, archive.read(members[name])) for name in wanted}


def _array(path: Path, name: str, raw: bytes) -> NDArray[Any]:
    from numpy.lib.format import read_array

    try:
        array: NDArray[Any] = read_array(io.BytesIO(raw), allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: array '{name}' holds Python objects, which are not loaded because that can run code; store a "
            "plain numeric array"
        ) from error
    return array
