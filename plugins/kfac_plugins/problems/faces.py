"""The FACES problem (method, section 6): rotated, scaled patches of the Olivetti images.

Recipe of Hinton and Salakhutdinov (Science 2006): from each of the 400 images, 414 patches of 25x25 are cut after a
rotation by -90 to 90 degrees and a reduction by a factor of 1.4 to 1.8; people 1 to 25 are for training, 31 to 40 for
testing (26 to 30 were for validation and are left out). Each pixel's training mean is subtracted and everything
divided by one number, so that the mean variance of the training pixels is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kfac_plugins.problems import FacesConfig
from kfac_plugins.problems._splits import autoencoder_split
from kfac_plugins.problems.olivetti import Olivetti, read_olivetti
from kfacore.errors import DataError
from kfacore.lab.data.cache import cached
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.places import cache_folder
from kfacore.lab.models import autoencoder, sparse_init
from kfacore.roles import Problem, ProblemData

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SIZES", "Faces", "cut_patches"]

SIZES = (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
"""Layer sizes of the paper."""

SIDE = 25
"""Height and width of a patch in pixels."""
SCALES = (1.4, 1.8)
"""Reduction: distance of neighbouring patch pixels in the image, in image pixels."""
SEED = 20060728
"""Of numpy's PCG64 generator; the date of the paper that introduced the data."""


class Faces(Problem):
    """Deep autoencoder of face patches: logistic units, a linear code of 30, Gaussian outputs.

    With the paper's 414 patches an image: 103,500 training and 41,400 test cases of 625 normalised intensities.
    """

    Config: ClassVar[type[FacesConfig]] = FacesConfig
    config: FacesConfig
    task: Literal["autoencoder", "classifier", "regression"] = "autoencoder"
    image_shape: tuple[int, int] | None = (SIDE, SIDE)

    def __init__(self, config: FacesConfig | None = None) -> None:
        super().__init__(config)
        self._mean: NDArray[np.float32] | None = None
        self._scale = 1.0

    def load(self) -> ProblemData:
        """Cut the patches, or read them from the cache, and normalise them."""
        olivetti = read_olivetti(self.config.data_dir)
        patches = self._patches(olivetti)
        train, test = (patches[part].astype(np.float32) for part in ("train", "test"))
        mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
        train -= mean
        scale = float(np.sqrt(np.square(train).mean(dtype=np.float64)))
        if scale == 0.0:
            raise DataError(f"{olivetti.source}: all patches are equal, nothing can be learned from them")
        train /= np.float32(scale)
        test -= mean
        test /= np.float32(scale)
        self._mean, self._scale = mean, scale
        return ProblemData(
            train=autoencoder_split(train),
            test=autoencoder_split(test),
            checksum=sha256_of_arrays(patches["train"], patches["test"]),
            source=str(olivetti.source),
            facts={"patches_per_image": self.config.patches_per_image, "pixel_scale": scale},
        )

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """625-2000-1000-500-30 and back, sparsely initialised."""
        model = autoencoder(SIZES)
        sparse_init(model, generator)
        return model

    def picture(self, values: Tensor) -> Tensor:
        """Undo the normalisation: (n, 625) to intensities in [0, 1]."""
        if self._mean is None:
            self.load()
        mean = torch.from_numpy(self._mean).to(values)
        return ((values * self._scale + mean) / 255.0).clamp(0.0, 1.0)

    def _patches(self, olivetti: Olivetti) -> dict[str, NDArray[np.uint8]]:
        """Arrays ``train`` and ``test`` of patches, (N, 625), 0 to 255."""
        parts = {"train": olivetti.person < 25, "test": olivetti.person >= 30}
        empty = [name for name, chosen in parts.items() if not chosen.any()]
        if empty:
            raise DataError(f"{olivetti.source}: no images of the people for the {empty[0]}ing set; the file is cut")
        count = self.config.patches_per_image

        def build() -> dict[str, NDArray[np.uint8]]:
            # all images are cut, so that a patch does not depend on which people are used for what
            patches = cut_patches(olivetti.images, count).reshape(len(olivetti.images), count, SIDE * SIDE)
            return {name: patches[chosen].reshape(-1, SIDE * SIDE) for name, chosen in parts.items()}

        return cached(self._cache_file(olivetti), build)

    def _cache_file(self, olivetti: Olivetti) -> Path:
        # Never into data_dir, which holds the user's files; named after the images, as copies differ.
        origin = sha256_of_arrays(olivetti.images, olivetti.person)[:12]
        return cache_folder() / f"faces-v1-{self.config.patches_per_image}-{origin}.npz"


def cut_patches(images: NDArray[np.float32], count: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Cut patches with random rotation, scale and position out of each image.

    A patch is a 25x25 grid with spacing s, uniform in 1.4 to 1.8, turned by an angle uniform in -90 to 90 degrees,
    with its centre uniform where the whole grid lies inside the image (the largest grid just fits at 45 degrees).
    Values between pixels are bilinear.

    Args:
        images: (n, h, w) pixel values 0 to 255, h and w of at least 63.
        count: Patches for each image.
        seed: Of the draws.

    Returns:
        (n * count, 625) rounded pixel values, the patches of an image one after the other.
    """
    draws = np.random.Generator(np.random.PCG64(seed)).random((len(images), count, 4))
    patches = np.empty((len(images), count, SIDE * SIDE), dtype=np.uint8)
    for index, image in enumerate(images):
        patches[index] = _cut(image, draws[index])
    return patches.reshape(-1, SIDE * SIDE)


def _cut(image: NDArray[np.float32], draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Patches of one image from (count, 4) uniform draws: angle, scale, row and column of the centre."""
    height, width = image.shape
    angle = (draws[:, 0] - 0.5) * np.pi
    scale = SCALES[0] + draws[:, 1] * (SCALES[1] - SCALES[0])
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    reach = (SIDE - 1) / 2.0 * (np.abs(cosine) + np.abs(sine))  # from the centre to the outermost grid point
    row = reach + draws[:, 2] * (height - 1 - 2.0 * reach)
    column = reach + draws[:, 3] * (width - 1 - 2.0 * reach)
    grid = np.arange(SIDE) - (SIDE - 1) / 2.0
    down, across = (axis.reshape(-1) for axis in np.meshgrid(grid, grid, indexing="ij"))
    rows = row[:, None] + cosine[:, None] * down + sine[:, None] * across
    columns = column[:, None] - sine[:, None] * down + cosine[:, None] * across
    return np.rint(_bilinear(image, rows, columns)).astype(np.uint8)


def _bilinear(
    image: NDArray[np.float32], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Values of an image at real-valued positions inside it."""
    height, width = image.shape
    top = np.clip(rows.astype(np.int32), 0, height - 2)
    left = np.clip(columns.astype(np.int32), 0, width - 2)
    # positions are inside up to rounding; clipping keeps the weights in [0, 1]
    lower = np.clip(rows - top, 0.0, 1.0).astype(np.float32)
    right = np.clip(columns - left, 0.0, 1.0).astype(np.float32)
    pixels = image.reshape(-1)
    corner = top * width + left
    above = pixels[corner] * (1.0 - right) + pixels[corner + 1] * right
    below = pixels[corner + width] * (1.0 - right) + pixels[corner + width + 1] * right
    values: NDArray[np.float32] = above * (1.0 - lower) + below * lower
    return values
