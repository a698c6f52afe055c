"""The role of momentum: the coefficients of the step delta = alpha Delta + mu delta_prev."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from kfacore.roles.base import Part
from kfacore.roles.block import share_of
from kfacore.schema.slots import MomentumConfig

__all__ = ["Momentum"]


class Momentum(Part):
    """Chooses (alpha, mu) from the quadratic model on the span of Delta and delta_prev (method, section 4).

    Attributes:
        uses_model: Whether the coefficients come from the quadratic model.
        uses_previous: Whether delta_prev is a direction of the step.
    """

    config: MomentumConfig
    uses_model: ClassVar[bool] = True
    uses_previous: ClassVar[bool] = True

    def cases(self, batch_size: int, positions: int = 1) -> int:
        """Cases of the quadratic model, ceil(tau_2 m), or ``min_cases`` if that is more: see `share_of`.

        Args:
            batch_size: Cases of the mini-batch.
            positions: Positions that a case has at least.
        """
        return share_of(batch_size, self.config.tau2, self.config.min_cases, positions)

    def iterations(self, batch_size: int) -> int:
        """Steps on the quadratic model of a mini-batch of this size."""
        return self.config.iterations if batch_size >= self.config.iterations_from else 1

    @abstractmethod
    def coefficients(
        self,
        M: Tensor,  # (c, 2, 2) float64
        b: Tensor,  # (c, 2) float64
    ) -> Tensor:  # (c, 2) float64
        """(alpha, mu) for each of c candidates.

        Args:
            M: Curvature of the quadratic model on (Delta, delta_prev); rows and columns of an unused delta_prev, or
                of the one that does not exist in the first step, are zero. Zero if no part uses the model.
            b: Gradient on the same directions.
        """
