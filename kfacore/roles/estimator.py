"""The role of a statistics estimator: what is sent back through the network to estimate the Fisher."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kfacore.roles.base import Part
from kfacore.roles.block import share_of
from kfacore.roles.likelihood import Likelihood
from kfacore.schema.slots import EstimatorConfig

__all__ = ["Estimator"]


class Estimator(Part):
    """Chooses what is sent back through the network to estimate the Fisher (method, section 2, step 3).

    An implementation gives the vectors v at the output; the expectation (or sum over passes) of v v^T must be the
    metric it stands for.

    Attributes:
        shares_passes: Whether vectors of several positions of a case, and of several heads of a model, may share a
            pass: their products vanish in expectation (targets are drawn for each), or belong to the metric. Otherwise
            each has passes of its own.
        draws: Whether vectors are drawn, each by itself and with mean zero, as those of sampled targets are. What sums
            them over cases or positions before it squares is then right in the mean; the others get random signs.
    """

    config: EstimatorConfig
    shares_passes: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def cases(self, batch_size: int, positions: int = 1) -> int:
        """Number of cases used, ceil(tau_1 m), or ``min_cases`` if that is more: see `share_of`.

        Args:
            batch_size: Cases of the mini-batch.
            positions: Positions that a case has at least.
        """
        return share_of(batch_size, self.config.tau1, self.config.min_cases, positions)

    @abstractmethod
    def output_vectors(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # the n cases' training targets
        likelihood: Likelihood,
        generator: torch.Generator,
    ) -> Tensor:  # (k, n, o)
        """The vectors to send back, one set for each of k passes."""
