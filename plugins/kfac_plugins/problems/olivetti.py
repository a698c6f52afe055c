"""The Olivetti face images: finding them and getting them through scikit-learn. Imports no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import ConfigError, DataError, ResourceError
from kfacore.lab.data.cache import write_cache
from kfacore.lab.data.npz import read_npz
from kfacore.lab.data.places import search_folders
from kfacore.lab.data.status import DataStatus, Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FILE", "Olivetti", "fetch_olivetti", "find_olivetti", "olivetti_status", "read_olivetti"]

FILE = "olivetti.npz"
"""Arrays ``images`` (400, 64, 64), bytes or real numbers in [0, 1], and ``person`` (400,), 0 to 39."""

PEOPLE = 40
_WHAT = "Olivetti faces, 400 images of 64x64, from which 25x25 patches are cut"
_ADVICE = f"run 'kfac data fetch faces', or name the folder of {FILE} with --data-dir or KFAC_DATA"
_INSTALL = "needs scikit-learn: install kfacore with its extra 'faces' (pip install 'kfacore[faces]')"


@dataclass(frozen=True)
class Olivetti:
    """The images.

    Attributes:
        images: (400, 64, 64) float32 from 0 to 255.
        person: (400,) who is shown, 0 to 39.
        source: The file.
    """

    images: NDArray[np.float32]
    person: NDArray[np.int64]
    source: Path


def find_olivetti(data_dir: str | Path | None = None) -> Path | None:
    """The first of ``data_dir``, ``KFAC_DATA`` and the cache that has the file; else scikit-learn's own copy.

    Raises:
        DataError: ``data_dir`` is not a folder.
    """
    for folder in search_folders(data_dir):
        if (folder / FILE).is_file():
            return folder / FILE
    home = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    copy = home / "olivetti_py3.pkz"
    return copy if copy.is_file() else None


def read_olivetti(data_dir: str | Path | None = None) -> Olivetti:
    """Find and read the images.

    Raises:
        DataError: Missing, corrupt, or arrays of the wrong shape, dtype or range.
        ResourceError: Only scikit-learn's copy is there, and scikit-learn is not installed.
    """
    path = find_olivetti(data_dir)
    if path is None:
        places = ", ".join(str(folder) for folder in search_folders(data_dir))
        raise DataError(f"the Olivetti faces ({FILE}) are not in {places}; {_ADVICE}")
    if path.suffix == ".npz":
        arrays = read_npz(path, required=("images", "person"), optional=())
        return _checked(arrays["images"], arrays["person"], path)
    images, person = _from_sklearn(download=False)
    return _checked(images, person, path)


def fetch_olivetti(folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
    """Get the images through scikit-learn, which downloads and verifies them, and store them in ``folder``.

    Raises:
        ConfigError: Mirrors are given, which scikit-learn does not take.
        ResourceError: scikit-learn is not installed, there is no network, or the folder cannot be written.
    """
    import numpy as np

    if mirrors:
        raise ConfigError("the faces come through scikit-learn, which has its own server; leave out --mirror")
    path = folder / FILE
    progress(FILE, 0, None)
    images, person = _from_sklearn(download=True)
    _checked(images, person, path)
    try:
        write_cache(path, {"images": np.asarray(images, dtype=np.float32), "person": np.asarray(person)})
    except OSError as error:
        raise ResourceError(
            f"cannot write {path} ({error.strerror or error}); choose another folder with --data-dir"
        ) from error
    size = path.stat().st_size
    progress(FILE, size, size)
    return [path]


def olivetti_status(data_dir: str | Path | None = None) -> DataStatus:
    """What is there, for ``kfac data list``. There is no checksum to compare with: copies differ in scale."""
    path = None
    try:
        path = find_olivetti(data_dir)
        if path is None:
            return DataStatus(_WHAT, "missing", advice=_ADVICE)
        if path.suffix == ".npz":
            read_olivetti(data_dir)
    except DataError as error:
        found = (path,) if path else ()
        return DataStatus(_WHAT, "corrupt", found, DataStatus.size_of(found) if found else None, str(error))
    return DataStatus(_WHAT, "unverified", (path,), DataStatus.size_of([path]))


def _from_sklearn(*, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ResourceError(f"reading the Olivetti faces {_INSTALL}") from error
    try:
        # scikit-learn reports on stdout, where only the command's own answer belongs, and warns of each failed attempt
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            bunch = datasets.fetch_olivetti_faces(download_if_missing=download)
    except OSError as error:
        raise ResourceError(
            f"scikit-learn cannot get the Olivetti faces ({error}); check the network, or put {FILE} into the data "
            "folder by hand"
        ) from error
    return bunch.images, bunch.target


def _checked(images: NDArray[Any], person: NDArray[Any], path: Path) -> Olivetti:
    import numpy as np

    if images.ndim != 3 or images.shape[1:] != (64, 64) or not len(images):
        raise DataError(f"{path}: array 'images' has shape {images.shape}; the Olivetti faces are (400, 64, 64)")
    if person.shape != (len(images),) or person.dtype.kind not in "ui":
        raise DataError(
            f"{path}: array 'person' has shape {person.shape} and dtype {person.dtype}; needed is one integer, 0 to "
            f"{PEOPLE - 1}, for each of the {len(images)} images"
        )
    if person.min() < 0 or person.max() >= PEOPLE:
        raise DataError(f"{path}: array 'person' has numbers from {person.min()} to {person.max()}; needed are 0 to 39")
    if images.dtype.kind not in "uif":
        raise DataError(f"{path}: array 'images' has dtype {images.dtype}; needed are bytes or reals in [0, 1]")
    values = images.astype(np.float32)
    top = 1.0 if images.dtype.kind == "f" else 255.0
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > top:
        raise DataError(f"{path}: array 'images' must have finite values from 0 to {top:g} ({images.dtype})")
    return Olivetti(values * np.float32(255.0 / top), person.astype(np.int64), path)
