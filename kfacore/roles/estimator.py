"""The role of a statistics estimator: from one linearised mini-batch to layer inputs and output gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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

__all__ = ["Estimator", "LayerSamples", "mean_diagonal"]


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


def mean_diagonal(samples: Sequence[LayerSamples]) -> Tensor:
    r"""Mean diagonal entry of the Fisher, tr F / P: what lambda is to be compared with.

    tr F is the mean over cases of sum_i |abar_i|^2 |g_i|^2, because a case's gradient by block i is g_i abar_i^T.

    Args:
        samples: What an estimator saw, one a layer.

    Returns:
        (), float64.
    """
    traces, parameters = [], 0
    for s in samples:
        per_case = s.inputs.square().sum(1) * s.gradients.square().sum((0, 2))
        traces.append(per_case.mean(dtype=torch.float64))
        parameters += s.inputs.shape[1] * s.gradients.shape[2]
    return torch.stack(traces).sum() / parameters


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
