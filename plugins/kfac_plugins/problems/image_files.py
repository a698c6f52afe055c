"""Labelled images from an .npz file or from a folder of images a class. Imports no torch; Pillow only for folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kfac_plugins.problems.npz_file import labels_of
from kfacore.errors import DataError, ResourceError
from kfacore.lab.data.npz import read_npz

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Channels", "Images", "read_images"]

Channels = Literal["first", "last"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SEED = 0
"""Of the choice of test images where the data has none."""


@dataclass(frozen=True)
class Images:
    """Images of several classes, training and test.

    Attributes:
        x_train: (N, c, h, w), bytes or real numbers as they are in the file.
        y_train: (N,) class numbers.
        x_test: (M, c, h, w); M may be 0.
        y_test: (M,).
        classes: Number of classes.
        source: The file or folder.
    """

    x_train: NDArray[Any]
    y_train: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    classes: int
    source: Path


def read_images(path: Path, *, size: int, channels: Channels | None, test_share: float) -> Images:
    """Read labelled images.

    Args:
        path: An .npz file with ``x_train`` and ``y_train`` (and ``x_test``, ``y_test``), or with ``images`` and
            ``labels``; or a folder with a folder of images for each class, or with two such folders ``train`` and
            ``test``.
        size: Height and width that images from a folder are brought to.
        channels: Where the channels of an array with four dimensions are; None to tell by their number, 1, 3 or 4.
        test_share: Share kept for testing where the data has no test images.

    Raises:
        DataError: Something is missing, of the wrong shape or type, or unreadable.
        ResourceError: Pillow is needed and not installed.
    """
    parts = _from_folder(path, size) if path.is_dir() else _from_npz(path, channels)
    x, y = parts[0]
    classes = max(2, int(y.max()) + 1)
    if len(parts) == 2:
        x_test, y_test = parts[1]
        if x_test.shape[1:] != x.shape[1:]:
            raise DataError(
                f"{path}: test images have shape {x_test.shape[1:]}, training images {x.shape[1:]}; both must agree"
            )
        if len(y_test) and int(y_test.max()) >= classes:
            raise DataError(
                f"{path}: a test image is of class {int(y_test.max())}, of which there is no training image"
            )
        return Images(x, y, x_test, y_test, classes, path)
    import numpy as np

    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(x))
    kept = len(x) - int(len(x) * test_share)
    train, test = np.sort(order[:kept]), np.sort(order[kept:])
    return Images(x[train], y[train], x[test], y[test], classes, path)


def _from_npz(path: Path, channels: Channels | None) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
    raw = read_npz(path)
    if "images" in raw and "labels" in raw:
        pairs = [("images", "labels")]
    elif "x_train" in raw and "y_train" in raw:
        pairs = [("x_train", "y_train")]
        if "x_test" in raw and "y_test" in raw:
            pairs.append(("x_test", "y_test"))
        elif "x_test" in raw or "y_test" in raw:
            raise DataError(f"{path}: has only one of x_test and y_test; give both or none")
    else:
        raise DataError(
            f"{path}: needed are the arrays x_train and y_train, or images and labels; found "
            f"{', '.join(sorted(raw)) or 'none'}"
        )
    found = []
    for images, labels in pairs:
        x = _channels_first(raw[images], channels, f"{path}: array '{images}'")
        y = labels_of(raw[labels], f"{path}: array '{labels}'")
        if len(x) != len(y):
            raise DataError(f"{path}: {len(x)} images in '{images}', {len(y)} labels in '{labels}'; each needs one")
        found.append((x, y))
    return found


def _channels_first(x: NDArray[Any], channels: Channels | None, where: str) -> NDArray[Any]:
    """Images as (N, c, h, w)."""
    import numpy as np

    if x.dtype.kind not in "fub" or (x.dtype.kind == "u" and x.dtype.itemsize > 1):
        raise DataError(f"{where} has dtype {x.dtype}; needed are bytes, 0 to 255, or real numbers")
    if x.ndim not in (3, 4) or not x.size:
        raise DataError(f"{where} has shape {x.shape}; needed are images, (N, h, w), (N, c, h, w) or (N, h, w, c)")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{where} holds NaN or infinity; remove or repair these images")
    if x.ndim == 3:
        return x[:, None]
    first, last = (x.shape[axis] in (1, 3, 4) for axis in (1, 3))
    if channels is None and first == last:
        raise DataError(
            f"{where} has shape {x.shape}, which does not tell where the channels are; say --set "
            "problem.channels=first or last"
        )
    return np.moveaxis(x, 3, 1) if (channels == "last" or (channels is None and last)) else x


def _from_folder(path: Path, size: int) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
    if (path / "train").is_dir() and (path / "test").is_dir():
        names = _class_names(path / "train")
        return [_images_in(path / part, names, size) for part in ("train", "test")]
    return [_images_in(path, _class_names(path), size)]


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder}: has {len(names)} folders in it; needed is a folder of images for each class")
    return names


def _images_in(folder: Path, names: list[str], size: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    import numpy as np

    images, labels = [], []
    for number, name in enumerate(names):
        for image in _pixels(folder / name, size):
            images.append(image)
            labels.append(number)
    if not images:
        raise DataError(f"{folder}: there are no images in its folders (looked for {', '.join(_ENDINGS)})")
    return np.stack(images), np.array(labels, dtype=np.int64)


def _pixels(folder: Path, size: int) -> Iterator[NDArray[np.uint8]]:
    """The images of one class, (3, size, size) bytes each, by name."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError("images from a folder need Pillow; install it with: pip install pillow") from error
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for file in files:
        if file.suffix.lower() not in _ENDINGS:
            continue
        try:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not a readable image ({error}); remove or repair it") from error
        yield np.ascontiguousarray(np.moveaxis(np.asarray(small, dtype=np.uint8), 2, 0))
