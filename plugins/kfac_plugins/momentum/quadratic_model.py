r"""Parameter-free momentum (Martens & Grosse 2015, section 7): (alpha, mu) = -M^+ b."""

from __future__ import annotations

from torch import Tensor

from kfac_plugins.momentum import QuadraticModelConfig
from kfacore.optim.quadratic import minimise_two
from kfacore.roles.momentum import Momentum

__all__ = ["QuadraticModelMomentum"]


class QuadraticModelMomentum(Momentum):
    """The minimum of the quadratic model on the plane of Delta and delta_prev; mu > 1 and mu < 0 are right."""

    Config = QuadraticModelConfig
    config: QuadraticModelConfig

    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        """-M^+ b for each candidate."""
        return minimise_two(M, b)
