r"""Re-scaling by the exact Fisher without momentum (Martens & Grosse 2015, section 6.4): alpha = -b_1 / M_11."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_plugins.momentum import NoMomentumConfig
from kfacore.optim.quadratic import minimise_one
from kfacore.roles.momentum import Momentum

__all__ = ["NoMomentum"]


class NoMomentum(Momentum):
    """The minimum of the quadratic model along Delta; mu = 0."""

    Config = NoMomentumConfig
    config: NoMomentumConfig
    uses_previous = False

    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        """(-b_1 / M_11, 0) for each candidate."""
        alpha = minimise_one(M[:, 0, 0], b[:, 0])
        return torch.stack([alpha, torch.zeros_like(alpha)], dim=1)
