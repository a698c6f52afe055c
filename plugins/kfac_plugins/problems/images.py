"""The problem of labelled images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kfac_plugins.problems._files import find_file
from kfac_plugins.problems._splits import labelled_split
from kfac_plugins.problems.image_configs import NO_IMAGES, ImagesConfig
from kfac_plugins.problems.image_files import Images, read_images
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.models import IMAGE_MODELS
from kfacore.roles import Problem, ProblemData

__all__ = ["LabelledImages"]

_STAGES = {"width": 16, "depth": 1}
_SIZES: dict[str, dict[str, int]] = {"resnet": _STAGES, "cnn": _STAGES, "vit": {"width": 64, "depth": 4}}
"""Sizes where the configuration has none."""


class LabelledImages(Problem):
    """A classifier of images (N, c, h, w).

    Each channel has mean 0 and variance 1 over the training images, bytes and real numbers alike.
    """

    Config: ClassVar[type[ImagesConfig]] = ImagesConfig
    config: ImagesConfig
    task: Literal["autoencoder", "classifier", "regression"] = "classifier"

    def __init__(self, config: ImagesConfig | None = None) -> None:
        super().__init__(config)
        self._images: Images | None = None

    @property
    def images(self) -> Images:
        """The images, read on first use.

        Raises:
            ConfigError: No file is named.
            DataError: It is missing, or something is wrong with it.
        """
        if self._images is None:
            config = self.config
            path = find_file(config.file, config.data_dir, needed=NO_IMAGES)
            self._images = read_images(path, size=config.size, channels=config.channels, test_share=config.test_share)
        return self._images

    def load(self) -> ProblemData:
        """Read the images and standardise their channels."""
        images = self.images
        x = images.x_train.astype(np.float32)
        mean = x.mean((0, 2, 3), keepdims=True, dtype=np.float64)
        deviation = np.maximum(x.std((0, 2, 3), keepdims=True, dtype=np.float64), 1e-8)

        def standard(values: NDArray[Any]) -> NDArray[np.float32]:
            scaled: NDArray[np.float32] = ((values - mean) / deviation).astype(np.float32)
            return scaled

        test = labelled_split(standard(images.x_test), images.y_test) if len(images.y_test) else None
        return ProblemData(
            train=labelled_split(standard(images.x_train), images.y_train),
            test=test,
            checksum=sha256_of_arrays(images.x_train, images.y_train, images.x_test, images.y_test),
            source=str(images.source),
            facts={"classes": images.classes, "shape": list(images.x_train.shape[1:])},
        )

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """See `kfacore.lab.models.images`.

        Raises:
            ConfigError: The patch does not divide the images, or the heads the width.
        """
        config, images = self.config, self.images
        shape = images.x_train.shape[1:]
        given = {"width": config.width, "depth": config.depth}
        options: dict[str, Any] = {key: given[key] or value for key, value in _SIZES[config.model].items()}
        if config.model == "vit":
            options |= {"heads": config.heads, "patch": config.patch, "dropout": config.dropout}
        return IMAGE_MODELS[config.model](shape, images.classes, generator=generator, **options)
