"""Constant damping: lambda and gamma as given, never adapted."""

from __future__ import annotations

import math

import torch

from kfac_plugins.damping import FixedDampingConfig
from kfacore.roles.damping import Damping

__all__ = ["FixedDamping"]


class FixedDamping(Damping):
    """lambda and gamma stay what they are. With ``pi = false`` this is the damping of Heskes (2000)."""

    Config = FixedDampingConfig
    config: FixedDampingConfig
    uses_model = False

    def start(self, weight_decay: float, device: torch.device) -> None:
        """The configured values; gamma = sqrt(lambda + eta) if not given."""
        c = self.config
        gamma = math.sqrt(c.lambda0 + weight_decay) if c.gamma is None else c.gamma
        self.lam = torch.tensor(c.lambda0, dtype=torch.float64, device=device)
        self.gamma = torch.tensor(gamma, dtype=torch.float64, device=device)
