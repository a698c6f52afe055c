r"""A given learning rate and momentum: delta = lr Delta + mu delta_prev, without any model."""

from __future__ import annotations

from torch import Tensor

from kfac_plugins.momentum import FixedMomentumConfig
from kfacore.roles.momentum import Momentum

__all__ = ["FixedMomentum"]


class FixedMomentum(Momentum):
    """Constant coefficients, as in Heskes (2000) and in most K-FAC libraries."""

    Config = FixedMomentumConfig
    config: FixedMomentumConfig
    uses_model = False

    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        """(lr, mu) for each candidate."""
        return b.new_tensor([[self.config.lr, self.config.mu]]).expand_as(b)
