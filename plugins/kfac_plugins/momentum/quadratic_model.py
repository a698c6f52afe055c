r"""Parameter-free momentum (Martens & Grosse 2015, section 7): (alpha, mu) = -M^+ b."""

from __future__ import annotations

import math

from torch import Tensor

from kfac_plugins.momentum import QuadraticModelConfig
from kfacore.optim.quadratic import minimise_two
from kfacore.roles.momentum import Momentum

__all__ = ["QuadraticModelMomentum"]


class QuadraticModelMomentum(Momentum):
    """The minimum of the quadratic model on the plane of Delta and delta_prev, with mu within bounds if there are any.

    For the model of the whole data mu > 1 and mu < 0 are right. A mini-batch's takes back with them what the examples
    of the steps before had gained, or goes on far beyond where they agreed.
    """

    Config = QuadraticModelConfig
    config: QuadraticModelConfig

    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        """-M^+ b for each candidate, or the best point of the bound."""
        c = self.config
        bounds = -math.inf if c.mu_min is None else c.mu_min, math.inf if c.mu_max is None else c.mu_max
        return minimise_two(M, b, bounds)
