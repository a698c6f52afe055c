"""The small classifier of the paper's Figure 1, on digits scaled down to 16x16 (method, section 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from kfac_plugins.problems import Mnist16ClassifierConfig
from kfac_plugins.problems._splits import labelled_split
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.mnist import read_mnist
from kfacore.lab.models import mlp, sparse_init
from kfacore.roles import Problem, ProblemData

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SIZES", "Mnist16Classifier", "area_downsample"]

SIDE = 16
SIZES = (SIDE * SIDE, 20, 20, 20, 20, 10)
"""Layer sizes of the paper: small enough for a dense Fisher."""


class Mnist16Classifier(Problem):
    """Digits from 16x16 images: four layers of 20 tanh units, softmax over 10 classes.

    60,000 training and 10,000 test cases of 256 intensities in [0, 1]. The paper does not say how the 28x28 images
    were scaled down; this is `area_downsample`.
    """

    Config: ClassVar[type[Mnist16ClassifierConfig]] = Mnist16ClassifierConfig
    config: Mnist16ClassifierConfig
    task: Literal["autoencoder", "classifier", "regression"] = "classifier"
    image_shape: tuple[int, int] | None = (SIDE, SIDE)

    def load(self) -> ProblemData:
        """Read MNIST, see `kfacore.lab.data.mnist`, and scale it down."""
        mnist = read_mnist(self.config.data_dir, verify=self.config.verify)
        return ProblemData(
            train=labelled_split(area_downsample(mnist.x_train, SIDE), mnist.y_train),
            test=labelled_split(area_downsample(mnist.x_test, SIDE), mnist.y_test),
            checksum=sha256_of_arrays(mnist.x_train, mnist.y_train, mnist.x_test, mnist.y_test),
            source=", ".join(str(path) for path in mnist.source),
            facts={"standard_mnist": mnist.verified, "downsampled": f"to {SIDE}x{SIDE} by area averages"},
        )

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """256-20-20-20-20-10 tanh, sparsely initialised."""
        model = mlp(SIZES, "tanh")
        sparse_init(model, generator)
        return model


def area_downsample(images: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Scale square images down: each new pixel is the mean over the area it covers, cut pixels counted by their share.

    With the overlap matrix R (side x h), R_ij the share of old row j in new row i, an image X becomes R X R^T.

    Args:
        images: (N, h, h) pixel values 0 to 255, h of at least ``side``.
        side: New height and width.

    Returns:
        (N, side * side) float32 in [0, 1].
    """
    old = images.shape[1]
    edges = np.arange(side + 1) * (old / side)
    columns = np.arange(old)
    overlap = np.minimum(edges[1:, None], columns + 1) - np.maximum(edges[:-1, None], columns)
    R = (np.clip(overlap, 0.0, None) * (side / old)).astype(np.float32)
    values = images.astype(np.float32) / np.float32(255.0)
    small: NDArray[np.float32] = np.matmul(R, np.matmul(values, R.T))
    # sums of shares exceed 1 by rounding only
    return small.clip(0.0, 1.0).reshape(len(images), side * side)
