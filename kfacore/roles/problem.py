"""The role of a problem: a model with its initialisation, data, likelihood and suggested schedule."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacore.roles.base import Part
from kfacore.schema.slots import ProblemConfig

__all__ = ["Problem", "ProblemData", "Split"]


@dataclass(frozen=True)
class Split:
    """Cases for training or testing.

    Attributes:
        inputs: (N, ...) the first dimension is the case.
        targets: (N, ...); the very same tensor object as `inputs` for an autoencoder.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Number of cases."""
        return int(self.inputs.shape[0])


@dataclass(frozen=True)
class ProblemData:
    """What a problem trains and tests on, on the CPU in float32 (targets may be integers).

    Attributes:
        train: Training cases.
        test: Test cases, if the problem has any.
        checksum: SHA-256 (hex) of the arrays, for the run's manifest.
        source: Where the data came from, in words (file names or "generated").
        facts: Anything else worth keeping in the manifest.
    """

    train: Split
    test: Split | None
    checksum: str
    source: str
    facts: dict[str, Any] = field(default_factory=dict)


class Problem(Part):
    """A model, its initialisation and its data (method, section 6).

    Attributes:
        task: ``"autoencoder"`` (error is the squared reconstruction error, pictures of reconstructions make sense if
            `image_shape` is set) or ``"classifier"`` or ``"regression"``.
        image_shape: (height, width) of one case for pictures, or None.
    """

    config: ProblemConfig
    task: Literal["autoencoder", "classifier", "regression"]
    image_shape: tuple[int, int] | None = None

    @abstractmethod
    def load(self) -> ProblemData:
        """Read or generate the data.

        Raises:
            DataError: The data is missing, corrupt, or of the wrong shape; the message says how to get it.
        """

    @abstractmethod
    def build_model(self, generator: torch.Generator) -> nn.Module:
        """The model, initialised with draws from the CPU generator alone, in float32 on the CPU.

        Must not need the data to be loaded, unless its sizes come from the data (problem ``npz``).
        """

    def picture(self, values: Tensor) -> Tensor:
        """Map model-space values (inputs or means) back to displayable intensities in [0, 1]; identity by default."""
        return values
