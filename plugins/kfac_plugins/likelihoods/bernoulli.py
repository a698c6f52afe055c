r"""Independent Bernoulli outputs (method, section 1).

p(y_j = 1 | z_j) = sigmoid(z_j). Targets may be any number in [0, 1] (grey pixels); the nll is then the cross-entropy.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kfac_plugins.likelihoods import BernoulliConfig
from kfac_plugins.likelihoods._targets import Row, require_finite, require_matrix
from kfacore.errors import DataError
from kfacore.roles import Likelihood, Terms

__all__ = ["Bernoulli"]


class Bernoulli(Likelihood):
    """nll = sum_j softplus(z_j) - y_j z_j; mean p = sigmoid(z); F_R = diag(p (1 - p)).

    z and y have shape (n, o), y in [0, 1].
    """

    Config: ClassVar[type[BernoulliConfig]] = BernoulliConfig
    config: BernoulliConfig

    def __init__(self, config: BernoulliConfig | None = None) -> None:
        super().__init__(config)
        weight, pos_weight = self.config.weight, self.config.pos_weight
        self._weight = None if weight is None else Row("weight", weight)
        self._pos_weight = None if pos_weight is None else Row("pos_weight", pos_weight)

    def nll(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n,)
        """Cross-entropy of each case in nats, summed over outputs; finite for any finite z."""
        # Beyond the threshold torch returns z itself; with its own, 20, a double would lose digits there.
        return (softplus(z, threshold=40.0) - y * z).sum(dim=-1)

    def mean(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """Probabilities p = sigmoid(z)."""
        return z.sigmoid()

    def sample(
        self,
        z: Tensor,  # (n, o)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (n, o)
        """1 where p >= u with u uniform on [0, 1), else 0, in the dtype of z.

        The comparison is the one of the authors' program, so that their recorded draws u give their targets.
        """
        u = torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return (self.mean(z) >= u).to(z.dtype)

    def residual(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """The derivative of the nll: p - y."""
        return z.sigmoid() - y

    def fisher_product(
        self,
        z: Tensor,  # (n, o)
        t: Tensor,  # (..., n, o)
    ) -> Tensor:  # (..., n, o)
        """F_R t = p (1 - p) t, entry by entry."""
        return _variance(z) * t

    def fisher_sqrt(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (o, n, o)
        """b_k = sqrt(p_k (1 - p_k)) e_k."""
        return _variance(z).sqrt().diag_embed().movedim(-1, 0)

    def error(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n,)
        """Squared reconstruction error ||y - p||^2, summed over outputs, without 1/2."""
        return self.residual(z, y).square().sum(dim=-1)

    def check_targets(
        self,
        y: Tensor,  # (N, o)
        outputs: int,
        where: str,
    ) -> None:
        """Refuse anything but a finite floating-point (N, o) matrix with entries in [0, 1]."""
        require_matrix(y, outputs, where, "bernoulli")
        require_finite(y, where)
        if y.numel() == 0:
            return
        low, high = float(y.min()), float(y.max())
        if low < 0.0 or high > 1.0:
            raise DataError(
                f"{where}: the bernoulli likelihood needs values in [0, 1], found {low:g} to {high:g}; rescale them "
                "(pixels: divide by 255) or use the gaussian likelihood"
            )

    def unfit(
        self,
        y: Tensor,  # (n, o)
        outputs: int,  # the range is that of every output
    ) -> Tensor:  # (n,)
        """Rows with an entry outside [0, 1], or NaN."""
        return ~((y >= 0.0) & (y <= 1.0)).flatten(1).all(1)

    def terms(
        self,
        y: Tensor,  # (n, o)
        outputs: int,
        like: Tensor,
    ) -> Terms:
        r"""With a weight w and a positive weight c the term of an output is -w [c y log p + (1 - y) log(1 - p)].

        That is w v (softplus(z) - (c y / v) z) with v = 1 + (c - 1) y: a weight w v and a target c y / v.
        """
        target, weight = y, None
        if self._pos_weight is not None:
            c = self._pos_weight.to(outputs, like)
            weight = 1.0 + (c - 1.0) * y
            # v is 0 only where c = 0 and y = 1, where the term is 0 whatever the target
            target = (c * y / torch.where(weight > 0, weight, torch.ones_like(weight))).clamp(max=1.0)
        if self._weight is not None:
            w = self._weight.to(outputs, like)
            weight = w.expand(y.shape) if weight is None else w * weight
        return Terms(target, weight)

    def factor(self, outputs: int) -> float:
        """1 / o for a mean over outputs."""
        return self.config.scale / outputs if self.config.mean_outputs else self.config.scale


def _variance(z: Tensor) -> Tensor:
    # sigmoid(z) sigmoid(-z), not p (1 - p): the latter loses all digits where p rounds to 1.
    return z.sigmoid() * (-z).sigmoid()
