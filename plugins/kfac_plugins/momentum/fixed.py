r"""A given learning rate and momentum: delta = lr Delta + mu delta_prev, without any model."""

from __future__ import annotations

import torch
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
        # Filled on the device: a tensor made of host numbers would be a copy that every step waits for.
        first = b[:, 0]
        return torch.stack([torch.full_like(first, self.config.lr), torch.full_like(first, self.config.mu)], dim=1)
