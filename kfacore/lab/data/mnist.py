"""The MNIST digits: finding the files, reading any of their usual forms, verifying and fetching them.

Forms: the four idx files, plain or ``.gz`` (also in torchvision's folder ``MNIST/raw``), or one ``mnist.npz`` with the
arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` (the form of keras). The checksum is the one of the idx content,
so it is the same whatever the form.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import DataError
from kfacore.lab.data.fetch import RemoteFile, fetch, mirrors_from
from kfacore.lab.data.idx import idx_bytes, parse_idx, uncompressed
from kfacore.lab.data.npz import read_npz
from kfacore.lab.data.places import search_folders
from kfacore.lab.data.status import DataStatus, Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FILES", "MIRRORS", "Mnist", "fetch_mnist", "find_mnist", "mnist_status", "read_mnist"]

log = logging.getLogger(__name__)

FILES: dict[str, RemoteFile] = {
    "x_train": RemoteFile(
        "train-images-idx3-ubyte.gz", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "y_train": RemoteFile(
        "train-labels-idx1-ubyte.gz", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "x_test": RemoteFile(
        "t10k-images-idx3-ubyte.gz", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "y_test": RemoteFile(
        "t10k-labels-idx1-ubyte.gz", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
"""The four files by the name of their array, with the checksum of the uncompressed content."""

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Servers that offer the four files."""

_WHAT = "MNIST digits, 28x28, 60,000 for training and 10,000 for testing"
_ADVICE = (
    "run 'kfac data fetch mnist', or name the folder of the four idx files or of mnist.npz with --data-dir or KFAC_DATA"
)


@dataclass(frozen=True)
class Mnist:
    """The arrays as they are in the files.

    Attributes:
        x_train: (N, h, w) pixel values 0 to 255.
        y_train: (N,) digits.
        x_test: (M, h, w).
        y_test: (M,).
        source: The files they come from.
        verified: Whether they are the standard MNIST, by checksum.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.uint8]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.uint8]
    source: tuple[Path, ...]
    verified: bool


def find_mnist(data_dir: str | Path | None = None) -> tuple[Path, ...]:
    """Look for the files in ``data_dir``, ``KFAC_DATA`` and the cache, and in the usual folders below each.

    Returns:
        The four idx files in the order of `FILES`, or one .npz file; empty if nothing was found.

    Raises:
        DataError: ``data_dir`` is not a folder, or the first folder that has any of the four files lacks another.
    """
    for folder in search_folders(data_dir):
        for place in _places(folder):
            found = _files_in(place)
            if found:
                if data_dir and folder != Path(data_dir).expanduser():
                    log.warning("no MNIST files in %s; using those in %s", data_dir, place)
                return found
    return ()


def read_mnist(data_dir: str | Path | None = None, *, verify: bool = True) -> Mnist:
    """Find and read MNIST.

    Args:
        data_dir: Folder named by the user.
        verify: Refuse anything but the standard MNIST. Data of the same form (other digits, clothes, a subset) need
            False.

    Raises:
        DataError: Missing, truncated, of the wrong shape or type, or the wrong checksum.
    """
    found = find_mnist(data_dir)
    if not found:
        places = ", ".join(str(folder) for folder in search_folders(data_dir))
        raise DataError(f"the MNIST files are not in {places}; {_ADVICE}")
    arrays: dict[str, NDArray[np.uint8]] = {}
    wrong: list[str] = []
    for name, where, array, content in _contents(found):
        arrays[name] = array
        if hashlib.sha256(content).hexdigest() != FILES[name].sha256:
            wrong.append(where)
    if wrong and verify:
        raise DataError(
            f"{wrong[0]}: wrong checksum, this is not the standard MNIST: the file is damaged or holds other data. "
            "Fetch it again with 'kfac data fetch mnist', or set problem.verify=false to use it as it is"
        )
    _check_shapes(arrays, found)
    return Mnist(
        arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], source=found, verified=not wrong
    )


def fetch_mnist(folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
    """Download the four files into ``folder/mnist``, where `find_mnist` looks.

    Args:
        folder: The data folder.
        mirrors: Base addresses; empty for those of ``KFAC_MIRROR`` or, without it, `MIRRORS`.
        progress: Told about every piece.

    Raises:
        ResourceError: No network, or the folder cannot be written.
        DataError: Wrong checksum.
    """
    return fetch(list(FILES.values()), folder / "mnist", mirrors or mirrors_from(None, MIRRORS), progress)


def mnist_status(data_dir: str | Path | None = None) -> DataStatus:
    """What is there and whether its checksum is right, for ``kfac data list``."""
    found: tuple[Path, ...] = ()
    try:
        found = find_mnist(data_dir)
        if not found:
            return DataStatus(_WHAT, "missing", advice=_ADVICE)
        verified = read_mnist(data_dir, verify=False).verified
    except DataError as error:
        size = DataStatus.size_of(found) if found else None
        return DataStatus(_WHAT, "corrupt", found, size, advice=str(error))
    advice = "" if verified else "not the standard MNIST; to use it all the same set problem.verify=false"
    return DataStatus(_WHAT, "verified" if verified else "unverified", found, DataStatus.size_of(found), advice=advice)


def _places(folder: Path) -> tuple[Path, ...]:
    return folder, folder / "mnist", folder / "MNIST" / "raw"


def _files_in(place: Path) -> tuple[Path, ...]:
    found: list[Path] = []
    missing: list[str] = []
    for file in FILES.values():
        candidates = [place / file.name.removesuffix(".gz"), place / file.name]
        existing = [path for path in candidates if path.is_file()]
        if existing:
            found.append(existing[0])
        else:
            missing.append(file.name)
    if found and not missing:
        return tuple(found)
    archive = place / "mnist.npz"
    if archive.is_file():
        return (archive,)
    if found:
        raise DataError(f"{place}: of the four MNIST files {', '.join(missing)} is missing; {_ADVICE}")
    return ()


def _contents(found: tuple[Path, ...]) -> Iterator[tuple[str, str, NDArray[np.uint8], bytes]]:
    """Each array's name, what to call it in messages, the array and its content as an idx file."""
    if len(found) == 1:
        arrays = read_npz(found[0], required=tuple(FILES), optional=())
        for name in FILES:
            where = f"{found[0]}: array '{name}'"
            array = _as_bytes(arrays[name], where)
            yield name, where, array, idx_bytes(array)
        return
    for name, path in zip(FILES, found, strict=True):
        raw = uncompressed(path)
        yield name, str(path), parse_idx(raw, str(path)), raw


def _as_bytes(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Accept any integer array whose entries fit in a byte; keras and others store labels as int64."""
    import numpy as np

    if array.dtype.kind not in "ui":
        raise DataError(f"{where} has dtype {array.dtype}; MNIST needs integers 0 to 255 (pixels, labels)")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise DataError(f"{where} has values from {array.min()} to {array.max()}; MNIST needs 0 to 255")
    return np.ascontiguousarray(array, dtype=np.uint8)


def _check_shapes(arrays: dict[str, NDArray[np.uint8]], found: tuple[Path, ...]) -> None:
    where = ", ".join(str(path) for path in found)
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or not len(images):
            raise DataError(f"{where}: x_{part} has shape {images.shape}; MNIST needs (N, 28, 28) with N of 1 or more")
        if labels.shape != (len(images),):
            raise DataError(
                f"{where}: y_{part} has shape {labels.shape} for {len(images)} images; each image needs one label"
            )
