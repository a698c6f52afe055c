r"""The empirical Fisher: the training targets instead of sampled ones.

Its expectation is not the Fisher of the model (Martens & Grosse 2015, section 5, last paragraph); it is here to be
compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_plugins.estimators import EmpiricalConfig
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood

__all__ = ["Empirical"]


class Empirical(Estimator):
    """v = mean(z) - y with the training target y: one pass."""

    Config = EmpiricalConfig
    config: EmpiricalConfig
    shares_passes = True

    def output_vectors(self, z: Tensor, y: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
        """(1, n, o)."""
        return likelihood.residual(z, y).unsqueeze(0)
