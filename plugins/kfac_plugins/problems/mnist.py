"""The MNIST autoencoder (method, section 6)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from kfac_plugins.problems import MnistConfig
from kfac_plugins.problems._splits import autoencoder_split, intensities
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.mnist import read_mnist
from kfacore.lab.models import autoencoder, sparse_init
from kfacore.roles import Problem, ProblemData

__all__ = ["SIZES", "Mnist"]

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
"""Layer sizes of the paper."""


class Mnist(Problem):
    """Deep autoencoder of digits: logistic units, a linear code of 30, Bernoulli outputs.

    60,000 training and 10,000 test cases of 784 intensities in [0, 1] (pixel values divided by 255).
    """

    Config: ClassVar[type[MnistConfig]] = MnistConfig
    config: MnistConfig
    task: Literal["autoencoder", "classifier", "regression"] = "autoencoder"
    image_shape: tuple[int, int] | None = (28, 28)

    def load(self) -> ProblemData:
        """Read the idx files or mnist.npz; see `kfacore.lab.data.mnist`."""
        mnist = read_mnist(self.config.data_dir, verify=self.config.verify)
        return ProblemData(
            train=autoencoder_split(intensities(mnist.x_train)),
            test=autoencoder_split(intensities(mnist.x_test)),
            checksum=sha256_of_arrays(mnist.x_train, mnist.x_test),
            source=", ".join(str(path) for path in mnist.source),
            facts={"standard_mnist": mnist.verified},
        )

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """784-1000-500-250-30 and back, sparsely initialised."""
        model = autoencoder(SIZES)
        sparse_init(model, generator)
        return model
