r"""One of c classes (method, section 1): p_k = exp(z_k) / sum_j exp(z_j), targets are class numbers 0..c-1."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfac_plugins.likelihoods import CategoricalConfig
from kfac_plugins.likelihoods._targets import Row
from kfacore.errors import DataError
from kfacore.roles import Likelihood, Terms

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """nll = logsumexp(z) - z_y; mean p = softmax(z); F_R = diag(p) - p p^T.

    z has shape (n, c); y holds n integers in 0..c-1, or a row of class probabilities q a case, which stands for their
    expectation: nll = logsumexp(z) - q^T z, with the same metric.
    """

    Config: ClassVar[type[CategoricalConfig]] = CategoricalConfig
    config: CategoricalConfig
    per = "position"

    def __init__(self, config: CategoricalConfig | None = None) -> None:
        super().__init__(config)
        weight = self.config.weight
        self._weight = None if weight is None else Row("weight", weight)

    def nll(
        self,
        z: Tensor,  # (n, c)
        y: Tensor,  # (n,) or (n, c)
    ) -> Tensor:  # (n,)
        """Negative log-probability of the target class, in nats."""
        if y.is_floating_point():
            return z.logsumexp(dim=-1) - (y * z).sum(dim=-1)
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
        return self._inverted(z, torch.rand((*z.shape[:-1], 1), generator=generator, dtype=z.dtype, device=z.device))

    def sample_part(
        self,
        z: Tensor,  # (n, c)
        own: Tensor,  # (n,)
        whole: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (n,)
        """One uniform number a case is drawn for all, whatever the number of classes."""
        return self._inverted(z, torch.rand((whole, 1), generator=generator, dtype=z.dtype, device=z.device)[own])

    def _inverted(self, z: Tensor, u: Tensor) -> Tensor:
        cumulative = self.mean(z).cumsum(dim=-1)
        # The last entry differs from 1 by rounding; scaling u by it keeps the shares right. "<=" skips classes of
        # probability 0 also for u = 0.
        below = cumulative <= u * cumulative[..., -1:]
        return below.sum(dim=-1).clamp(max=z.shape[-1] - 1)

    def residual(
        self,
        z: Tensor,  # (n, c)
        y: Tensor,  # (n,) or (n, c)
    ) -> Tensor:  # (n, c)
        """The derivative of the nll: p - e_y."""
        p = self.mean(z)
        if y.is_floating_point():
            return p - y
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
        y: Tensor,  # (n,) or (n, c)
    ) -> Tensor:  # (n,)
        """1 where the most probable class is not the target, else 0, in the dtype of z."""
        labels = y.argmax(dim=-1) if y.is_floating_point() else y.long()
        return (z.argmax(dim=-1) != labels).to(z.dtype)

    def check_targets(
        self,
        y: Tensor,  # (N,); (N, c) too if the configuration says soft
        outputs: int,
        where: str,
    ) -> None:
        """Refuse anything but a vector of integers in 0..c-1 (or the ignored number), or rows of probabilities."""
        if self.config.soft and y.is_floating_point() and tuple(y.shape[1:]) == (outputs,):
            self._check_probabilities(y, outputs, where)
            return
        if y.ndim != 1:
            raise DataError(
                f"{where}: the categorical likelihood needs shape (N,), one class number an example, found "
                f"{tuple(y.shape)}; {_advice(y)}"
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(
                f"{where}: the categorical likelihood needs integer class numbers, found "
                f"{str(y.dtype).removeprefix('torch.')}; convert them, for example with .long()"
            )
        if y.numel() == 0:
            return
        y = y.long()  # torch compares small integers in their own dtype, where 256 is 0
        wrong = self.unfit(y, outputs)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"{where}: class numbers must lie in 0..{outputs - 1} (the model has {outputs} outputs), found "
                f"{int(y[first])} at example {first} and {int(wrong.sum())} such examples in all; renumber the classes "
                f"or give the model more outputs{self._padding(y, wrong)}"
            )

    def _padding(self, y: Tensor, wrong: Tensor) -> str:
        """What to do about labels that mark padding."""
        found = y[wrong]
        alone = bool((found == found[0]).all()) and int(found[0]) < 0
        return f", or say likelihood.ignore_index={int(found[0])} if it marks what does not count" if alone else ""

    def _check_probabilities(self, y: Tensor, outputs: int, where: str) -> None:
        wrong = self.unfit(y, outputs)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"{where}: {int(wrong.sum())} of {len(y)} rows are no class probabilities (each in [0, 1], their sum "
                f"1), the first is row {first} with sum {float(y[first].sum()):g}; normalise them"
            )

    def unfit(
        self,
        y: Tensor,  # (n,) or (n, c)
        outputs: int,
    ) -> Tensor:  # (n,)
        """Class numbers outside 0..c-1 that are not the ignored one; rows that are no probabilities."""
        if y.is_floating_point():
            slack = max(1e-5, 8 * outputs * torch.finfo(y.dtype).eps)
            return ~(((y >= 0.0) & (y <= 1.0)).all(-1) & ((y.sum(-1) - 1.0).abs() <= slack))
        wrong = (y < 0) | (y >= outputs)
        ignored = self.config.ignore_index
        return wrong if ignored is None else wrong & (y != ignored)

    def terms(
        self,
        y: Tensor,  # (n,) or (n, c)
        outputs: int,
        like: Tensor,
    ) -> Terms:
        r"""With smoothing s and weights w the term of a row is -sum_k v_k log p_k.

        v_k = w_k ((1 - s) q_k + s / c), q the target (e_y for a class number). That is a nll(z, v / a) with
        a = sum_k v_k. A mean over positions is divided by the sum of w_y for class numbers, and by their number for
        probabilities, as torch's is.
        """
        smoothing = self.config.label_smoothing
        w = None if self._weight is None else self._weight.to(outputs, like)
        if y.is_floating_point():
            q = y.to(like.dtype)
            if smoothing:
                q = (1.0 - smoothing) * q + smoothing / outputs
            return Terms(q) if w is None else _weighted(w * q)
        ignored = self.config.ignore_index
        counts = None if ignored is None else y != ignored
        # An index out of range would end the process on a GPU; rows that have one are refused or do not count.
        y = y.clamp(0, outputs - 1)
        share = None if w is None else w[y]
        if not smoothing:
            return Terms(y, share, share, counts)
        v = torch.full((len(y), outputs), smoothing / outputs, dtype=like.dtype, device=like.device)
        v = v.scatter_add(-1, _column(y), torch.full_like(v[:, :1], 1.0 - smoothing))
        if w is None:
            return Terms(v, counts=counts)
        smoothed = _weighted(v * w)
        return Terms(smoothed.target, smoothed.weight, share, counts)


def _advice(y: Tensor) -> str:
    """What makes class numbers of it."""
    if y.ndim > 1 and y.shape[-1] == 1:
        whole = "" if not y.is_floating_point() else ".long()"
        file = "a file should hold integers; " if whole else ""
        return f"{file}a column of class numbers becomes a vector with .squeeze({y.ndim - 1}){whole}"
    return "from one-hot rows take .argmax(1)" if y.ndim == 2 else "give one class number an example"


def _weighted(v: Tensor) -> Terms:
    """-sum_k v_k log p_k as a weight times the nll of a target."""
    a = v.sum(-1)
    return Terms(v / torch.where(a > 0, a, torch.ones_like(a)).unsqueeze(-1), a)


def _column(y: Tensor) -> Tensor:
    # gather and scatter take 64-bit indices only; a no-op for labels that are
    return y.long().unsqueeze(-1)
