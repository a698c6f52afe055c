"""No trust rule: every step is taken (Martens & Grosse 2015; method, section 2, step 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_plugins.trust import NoTrustConfig
from kfacore.roles.trust import Trust

__all__ = ["NoTrust"]


class NoTrust(Trust):
    """Asks nothing and undoes nothing."""

    Config = NoTrustConfig
    config: NoTrustConfig

    def asks(self, step: int) -> bool:
        """Never."""
        return False

    def attempts(self, step: int) -> int:
        """One."""
        return 1

    def accepts(self, before: Tensor, change: Tensor) -> Tensor:
        """Always."""
        return torch.ones_like(change, dtype=torch.bool)

    def doubts(self, objective: float) -> bool:
        """Never."""
        return False

    def disowns(self, now: float, earlier: float) -> bool:
        """Never."""
        return False
