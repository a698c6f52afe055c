r"""The Monte-Carlo estimator: targets sampled from the model's own predictive distribution.

E over y ~ p(y|z) of (d nll/dz)(d nll/dz)^T is the Fisher metric F_R, so one sampled backward pass is an unbiased
estimate of the Fisher (Martens & Grosse 2015, section 5; method, section 2, step 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_plugins.estimators import MonteCarloConfig
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood

__all__ = ["MonteCarlo"]


class MonteCarlo(Estimator):
    """v = mean(z) - y with y ~ p(y | z): one pass."""

    Config = MonteCarloConfig
    config: MonteCarloConfig
    shares_passes = True
    draws = True

    def output_vectors(self, z: Tensor, y: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
        """(1, n, o)."""
        return likelihood.residual(z, likelihood.sample(z, generator)).unsqueeze(0)
