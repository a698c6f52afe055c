r"""The exact estimator: the expectation over targets in closed form.

With F_R = sum over j of b_j b_j^T at the output, sending every b_j back gives sum over j of g_j g_j^T, whose mean over
cases is the exact output factor (Heskes 2000; Martens 2014). It costs one backward pass for each output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_plugins.estimators import ExactConfig
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood

__all__ = ["Exact"]


class Exact(Estimator):
    """v_j = b_j, the columns of the square root of the Fisher metric: k passes, for nets with few outputs."""

    Config = ExactConfig
    config: ExactConfig

    def output_vectors(self, z: Tensor, y: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
        """(k, n, o)."""
        return likelihood.fisher_sqrt(z)
