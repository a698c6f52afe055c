r"""Real outputs with unit variance (method, section 1): y ~ N(z, I)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfac_plugins.likelihoods import GaussianConfig
from kfac_plugins.likelihoods._targets import require_finite, require_matrix
from kfacore.roles import Likelihood

__all__ = ["Gaussian"]


class Gaussian(Likelihood):
    """nll = 1/2 ||y - z||^2 (the constant is left out); mean z; F_R = I.

    z and y have shape (n, o).
    """

    Config: ClassVar[type[GaussianConfig]] = GaussianConfig
    config: GaussianConfig

    def nll(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n,)
        """Half the squared distance, summed over outputs."""
        return 0.5 * (y - z).square().sum(dim=-1)

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
        """The mean z plus standard normal noise."""
        return z + torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)

    def residual(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """The derivative of the nll: z - y."""
        return z - y

    def fisher_product(
        self,
        z: Tensor,  # (n, o)
        t: Tensor,  # (..., n, o)
    ) -> Tensor:  # (..., n, o)
        """The identity: t."""
        return t

    def fisher_sqrt(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (o, n, o)
        """b_k = e_k."""
        o = z.shape[-1]
        return torch.eye(o, dtype=z.dtype, device=z.device)[:, None, :].expand(o, z.shape[0], o)

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
