r"""One of c classes (method, section 1): p_k = exp(z_k) / sum_j exp(z_j), targets are class numbers 0..c-1."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfac_plugins.likelihoods import CategoricalConfig
from kfacore.errors import DataError
from kfacore.roles import Likelihood

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """nll = logsumexp(z) - z_y; mean p = softmax(z); F_R = diag(p) - p p^T.

    z has shape (n, c); y holds n integers in 0..c-1.
    """

    Config: ClassVar[type[CategoricalConfig]] = CategoricalConfig
    config: CategoricalConfig

    def nll(
        self,
        z: Tensor,  # (n, c)
        y: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """Negative log-probability of the target class, in nats."""
        return z.logsumexp(dim=-1) - z.gather(-1, _column(y)).squeeze(-1)

    def mean(
        self,
        z: Tensor,  # (n, c)
    ) -> Tensor:  # (n, c)
        """Class probabilities p."""
        return z.softmax(dim=-1)

    def sample(
        self,
        z: Tensor,  # (n, c)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (n,)
        """A class number for each case, by inverting the cumulative distribution.

        `torch.multinomial` reads its input back to check it, which would make every step wait for the device.
        """
        cumulative = self.mean(z).cumsum(dim=-1)
        u = torch.rand((*z.shape[:-1], 1), generator=generator, dtype=z.dtype, device=z.device)
        # The last entry differs from 1 by rounding; scaling u by it keeps the shares right. "<=" skips classes of
        # probability 0 also for u = 0.
        below = cumulative <= u * cumulative[..., -1:]
        return below.sum(dim=-1).clamp(max=z.shape[-1] - 1)

    def residual(
        self,
        z: Tensor,  # (n, c)
        y: Tensor,  # (n,)
    ) -> Tensor:  # (n, c)
        """The derivative of the nll: p - e_y."""
        p = self.mean(z)
        return p - torch.zeros_like(p).scatter(-1, _column(y), 1.0)

    def fisher_product(
        self,
        z: Tensor,  # (n, c)
        t: Tensor,  # (..., n, c)
    ) -> Tensor:  # (..., n, c)
        """diag(p) t - p (p^T t)."""
        p = self.mean(z)
        pt = p * t
        return pt - p * pt.sum(dim=-1, keepdim=True)

    def fisher_sqrt(
        self,
        z: Tensor,  # (n, c)
    ) -> Tensor:  # (c, n, c)
        """b_k = sqrt(p_k) (e_k - p): the score of each class weighted by the root of its probability."""
        p = self.mean(z)
        scores = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)[:, None, :] - p
        return p.sqrt().movedim(-1, 0)[..., None] * scores

    def error(
        self,
        z: Tensor,  # (n, c)
        y: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """1 where the most probable class is not the target, else 0, in the dtype of z."""
        return (z.argmax(dim=-1) != y).to(z.dtype)

    def check_targets(
        self,
        y: Tensor,  # (N,)
        outputs: int,
        where: str,
    ) -> None:
        """Refuse anything but a vector of integers in 0..c-1."""
        if y.ndim != 1:
            raise DataError(
                f"{where}: the categorical likelihood needs shape (N,), one class number a case, found "
                f"{tuple(y.shape)}; from one-hot rows take .argmax(1)"
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(
                f"{where}: the categorical likelihood needs integer class numbers, found "
                f"{str(y.dtype).removeprefix('torch.')}; convert them, for example with .long()"
            )
        if y.numel() == 0:
            return
        wrong = (y < 0) | (y >= outputs)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"{where}: class numbers must lie in 0..{outputs - 1} (the model has {outputs} outputs), found "
                f"{int(y[first])} at case {first} and {int(wrong.sum())} such cases in all; renumber the classes or "
                "give the model more outputs"
            )


def _column(y: Tensor) -> Tensor:
    # gather and scatter take 64-bit indices only; a no-op for labels that are
    return y.long().unsqueeze(-1)
