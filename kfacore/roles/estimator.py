"""The role of a statistics estimator: from one linearised mini-batch to layer inputs and output gradients."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfacore.config.slots import EstimatorConfig
from kfacore.layers import share_of
from kfacore.roles.base import Part
from kfacore.roles.likelihood import Likelihood

if TYPE_CHECKING:
    from kfacore.linearize import Linearization

__all__ = ["Estimator", "LayerSamples"]


@dataclass(frozen=True)
class LayerSamples:
    """What an estimator saw at one layer.

    Attributes:
        inputs: abar, (n, d_in), with the homogeneous 1 last if the layer has a bias.
        gradients: g for each backward pass, (k, n, d_out). Second moments are sums over passes and cases divided by
            n: a pass is one term of a sum, not one more case.
    """

    inputs: Tensor
    gradients: Tensor

    @property
    def cases(self) -> int:
        """Number of cases, n."""
        return int(self.inputs.shape[0])


class Estimator(Part):
    """Chooses what is sent back through the network to estimate the Fisher (method, section 2, step 3).

    An implementation gives the vectors v at the output; the expectation (or sum over passes) of v v^T must be the
    metric it stands for.
    """

    config: EstimatorConfig

    def cases(self, batch_size: int) -> int:
        """Number of cases used, ceil(tau_1 m)."""
        return share_of(batch_size, self.config.tau1)

    @abstractmethod
    def output_vectors(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # the n cases' training targets
        likelihood: Likelihood,
        generator: torch.Generator,
    ) -> Tensor:  # (k, n, o)
        """The vectors to send back, one set for each of k passes."""

    def collect(
        self, linearization: Linearization, y: Tensor, likelihood: Likelihood, generator: torch.Generator
    ) -> list[LayerSamples]:
        """Run the backward passes and return what each layer saw, in execution order.

        Args:
            linearization: The mini-batch, whose first chunk holds exactly the cases of this estimator.
            y: The mini-batch's targets.
            likelihood: The likelihood.
            generator: Source of every draw.
        """
        z = linearization.statistics_outputs()
        vectors = self.output_vectors(z, y[: z.shape[0]], likelihood, generator)
        return linearization.backpropagate(vectors)
