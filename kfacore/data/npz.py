"""Reading .npz files that users bring: no pickles, and a clear message for everything that can be wrong."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import DataError, nearest

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
    """
    import numpy as np

    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a .npz file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}")
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise DataError(f"{path}: this is a single .npy array; store named arrays with numpy.savez")
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            missing = [name for name in required if name not in names]
            if missing:
                hint = nearest(missing[0], names)
                raise DataError(f"{path}: has no array '{missing[0]}'; {hint or 'the file is empty'}")
            wanted = names if optional is None else [name for name in names if name in {*required, *optional}]
            arrays = {name: _array(path, name, archive) for name in wanted}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a .npz file, or corrupt or truncated ({error}); write it anew") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return arrays


def _array(path: Path, name: str, archive: Any) -> NDArray[Any]:
    try:
        array: NDArray[Any] = archive[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: array '{name}' holds Python objects, which are not loaded because that can run code; store a "
            "plain numeric array"
        ) from error
    return array
