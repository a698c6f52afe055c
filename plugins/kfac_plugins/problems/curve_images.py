"""Images of smooth curves through three random points: a regeneration of the CURVES data. Imports no torch.

The file that Hinton and Salakhutdinov (Science 2006) used is not public any more. They describe it as 28x28 images of
curves made from three random points in two dimensions, 20,000 for training and 10,000 for testing. This module draws
its own: the same kind of image, not the same images, so errors can be compared with published ones in size only.

Recipe: three points uniform in a central square; the parabola through them, entered and left at the two that are
farthest apart, parametrised by the distances between the points (one smooth stroke, no hairpins); ink
(1 - (d/r)^2)^2 at distance d < r of the stroke. The square and r make the images as hard for a linear code as the
original ones: the residual of 18 principal components, 5.90 an image in the 2006 paper, is 5.87 here.

Only additions, multiplications, divisions and square roots are used, all exactly rounded, and the generator is
numpy's PCG64: every machine draws the same bytes, so the checksum is a constant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kfacore.errors import DataError
from kfacore.lab.data.cache import cached, read_cache
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.places import cache_folder, named_folder
from kfacore.lab.data.status import DataStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CHECKSUM", "TEST_CASES", "TRAIN_CASES", "curves_file", "curves_status", "draw_curves", "load_curves"]

TRAIN_CASES = 20_000
TEST_CASES = 10_000
SIDE = 28
"""Height and width of an image in pixels."""

SEED = 20060728
"""Of the generator; the date of the paper that introduced the data."""
POINT_SQUARE = 15.25
"""Side of the square of the points, in pixels, in the middle of the image."""
RADIUS = 2.5
"""Distance from the stroke, in pixels, where the ink ends."""
SAMPLES = 64
"""Points along a curve; at most about half a pixel apart, which cannot be seen."""

CHECKSUM = "ff9c27b7d40e9af83f2451104a2037fd19da19297c1572d3e930280593808fb4"
"""SHA-256 of the two arrays ``test`` and ``train``, as `sha256_of_arrays` gives it."""

_CHUNK = 1000  # images drawn at a time: small enough for the processor's cache
_WHAT = "curves, 28x28, 20,000 for training and 10,000 for testing; a regeneration, not the original file"


def draw_curves(count: int) -> NDArray[np.uint8]:
    """Draw the first images of the data set.

    Args:
        count: Number of images; the first ones do not depend on it.

    Returns:
        (count, 784) ink from 0 to 255, row by row.
    """
    import numpy as np

    rng = np.random.Generator(np.random.PCG64(SEED))
    low = (SIDE - 1 - POINT_SQUARE) / 2.0
    points = rng.random((count, 3, 2)) * POINT_SQUARE + low
    images = np.empty((count, SIDE * SIDE), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        images[start : start + _CHUNK] = _ink(_parabolas(points[start : start + _CHUNK]))
    return images


def _parabolas(points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Points along each curve: (n, 3, 2) -> (n, SAMPLES, 2)."""
    import numpy as np

    # squared length of the side opposite to each point; the point opposite to the longest one goes in the middle
    opposite = ((points[:, [1, 0, 0]] - points[:, [2, 2, 1]]) ** 2).sum(axis=2)
    order = np.array([[1, 0, 2], [0, 1, 2], [0, 2, 1]])[opposite.argmax(axis=1)]
    first, middle, last = np.moveaxis(np.take_along_axis(points, order[:, :, None], axis=1), 1, 0)
    before = np.sqrt(((middle - first) ** 2).sum(axis=1))
    after = np.sqrt(((last - middle) ** 2).sum(axis=1))
    # time of the middle point, kept off the ends where the parabola would be undefined
    m = np.clip(before / (before + after), 0.1, 0.9)[:, None, None]
    t = (np.arange(SAMPLES) / (SAMPLES - 1.0))[None, :, None]
    # Lagrange's polynomials for the times 0, m and 1
    curve: NDArray[np.float64] = (
        first[:, None] * ((t - m) * (t - 1.0) / m)
        + middle[:, None] * (t * (t - 1.0) / (m * (m - 1.0)))
        + last[:, None] * (t * (t - m) / (1.0 - m))
    )
    return curve.astype(np.float32)


def _ink(curve: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Ink of each pixel: (n, SAMPLES, 2) -> (n, 784)."""
    import numpy as np

    pixels = np.arange(SIDE, dtype=np.float32)
    squares = (curve[..., None] - pixels) ** 2  # (n, SAMPLES, 2, SIDE), squared distance to each column and row
    nearest = np.full((len(curve), SIDE, SIDE), np.inf, dtype=np.float32)
    scratch = np.empty_like(nearest)
    for sample in range(SAMPLES):
        np.add(squares[:, sample, 1, :, None], squares[:, sample, 0, None, :], out=scratch)
        np.minimum(nearest, scratch, out=nearest)
    fade = np.maximum(np.float32(1.0) - nearest / np.float32(RADIUS * RADIUS), np.float32(0.0))
    ink: NDArray[np.float32] = np.rint(fade * fade * np.float32(255.0))
    return ink.astype(np.uint8).reshape(len(curve), -1)


def curves_file(data_dir: str | None = None) -> Path:
    """Where the images are kept.

    Raises:
        DataError: ``data_dir`` is given and is no folder.
    """
    return (named_folder(data_dir) if data_dir else cache_folder()) / "curves-v1.npz"


def load_curves(data_dir: str | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training and test images, from the cache or drawn (some seconds) and kept there.

    Returns:
        (20000, 784) and (10000, 784), ink from 0 to 255.
    """

    def build() -> dict[str, NDArray[np.uint8]]:
        images = draw_curves(TRAIN_CASES + TEST_CASES)
        return {"train": images[:TRAIN_CASES], "test": images[TRAIN_CASES:]}

    arrays = cached(curves_file(data_dir), build, checksum=CHECKSUM)
    return arrays["train"], arrays["test"]


def curves_status(data_dir: str | None = None) -> DataStatus:
    """Whether the images are on disk already, for ``kfac data list``."""
    path = curves_file(data_dir)
    if not path.is_file():
        return DataStatus(_WHAT, "generated", advice="made on first use, in some seconds; nothing to do")
    size = DataStatus.size_of([path])
    try:
        arrays = read_cache(path)
        right = sha256_of_arrays(*(arrays[name] for name in sorted(arrays))) == CHECKSUM
    except DataError:
        right = False
    advice = "" if right else "made anew on next use; nothing to do"
    return DataStatus(_WHAT, "verified" if right else "corrupt", (path,), size, advice)
