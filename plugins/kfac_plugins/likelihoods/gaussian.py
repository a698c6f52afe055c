r"""Real outputs with a known variance (method, section 1): y ~ N(z, sigma^2 I), sigma^2 = 1 by default."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kfac_plugins.likelihoods import GaussianConfig
from kfac_plugins.likelihoods._targets import require_finite, require_matrix
from kfacore.roles import Likelihood

__all__ = ["Gaussian"]


class Gaussian(Likelihood):
    """nll = ||y - z||^2 / (2 sigma^2) (the constant is left out); mean z; F_R = I / sigma^2.

    z and y have shape (n, o).
    """

    Config: ClassVar[type[GaussianConfig]] = GaussianConfig
    config: GaussianConfig

    def nll(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n,)
        """Half the squared distance over the variance, summed over outputs."""
        return self._over(0.5 * (y - z).square().sum(dim=-1))

    def mean(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """The mean is z itself."""
        return z

    def sample(
        self,
        z: Tensor,  # (n, o)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (n, o)
        """The mean z plus normal noise of the variance."""
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return z + (noise if self.config.variance == 1.0 else math.sqrt(self.config.variance) * noise)

    def residual(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """The derivative of the nll: (z - y) / sigma^2."""
        return self._over(z - y)

    def fisher_product(
        self,
        z: Tensor,  # (n, o)
        t: Tensor,  # (..., n, o)
    ) -> Tensor:  # (..., n, o)
        """A multiple of the identity: t / sigma^2."""
        return self._over(t)

    def fisher_sqrt(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (o, n, o)
        """b_k = e_k / sigma."""
        o = z.shape[-1]
        eye = torch.eye(o, dtype=z.dtype, device=z.device)
        if self.config.variance != 1.0:
            eye = eye / math.sqrt(self.config.variance)
        return eye[:, None, :].expand(o, z.shape[0], o)

    def error(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n,)
        """Squared error ||y - z||^2, summed over outputs, without 1/2."""
        return (y - z).square().sum(dim=-1)

    def check_targets(
        self,
        y: Tensor,  # (N, o)
        outputs: int,
        where: str,
    ) -> None:
        """Refuse anything but a finite floating-point (N, o) matrix."""
        require_matrix(y, outputs, where, "gaussian")
        require_finite(y, where)

    def factor(self, outputs: int) -> float:
        """1 / o for a mean over outputs."""
        return self.config.scale / outputs if self.config.mean_outputs else self.config.scale

    def constant(self, outputs: int) -> float:
        """Torch's Gaussian loss has 1/2 log sigma^2 an output, and 1/2 log(2 pi) if it is ``full``."""
        if self.criterion is None or not hasattr(self.criterion, "full"):
            return 0.0
        full = math.log(2 * math.pi) if self.criterion.full else 0.0
        return 0.5 * outputs * (math.log(self.config.variance) + full)

    def _over(self, value: Tensor) -> Tensor:
        return value if self.config.variance == 1.0 else value / self.config.variance
