r"""Tempered factors: a damped factor to a power p below 1.

Between the Fisher (p = 1) and plain gradient descent (p = 0) lies partial curvature correction (Huh 2020; Amari et al.
2021 compare the ends and the middle). With Xd = X + c I = Q diag(x + c) Q^T a factor becomes

    D = c (Xd / c)^p = Q diag(d) Q^T,       d = c ((x + c) / c)^p:

what the damping alone makes stays, what is far above it shrinks, and the matrix keeps its units. Layer by layer the
block becomes gamma^2 (Ad (x) Gd / gamma^2)^p, whatever pi is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfacore import host
from kfacore.curvature.linalg import (
    EIGENPROBLEM,
    eigh_again,
    eigh_batch,
    eigh_psd,
    in_batches,
    try_eigh,
)
from kfacore.curvature.roots import inverse_roots, ratios
from kfacore.curvature.spd import Root, shifted
from kfacore.errors import NumericalError
from kfacore.roles.inverse import Notice

__all__ = ["ByInverse", "Tempered", "powers_of", "temper", "untempered"]


@dataclass(frozen=True)
class Tempered(Root):
    """A tempered factor D with its inverse, and a root of it.

    Attributes:
        rows: Q^T, eigenvectors in rows, (d, d).
        damped: Eigenvalues x + c of Xd, (d,).
        tempered: Those of D, (d,).
        inverse: D^-1, (d, d).
    """

    rows: Tensor
    damped: Tensor
    tempered: Tensor
    inverse: Tensor

    def times(
        self,
        V: Tensor,  # (d, m)
    ) -> Tensor:
        """D V."""
        return self.rows.T @ (self.rows @ V).mul_(self.tempered.unsqueeze(1))

    def whiten(self, X: Tensor) -> Tensor:
        """diag(x + c)^-1/2 Q^T X."""
        return (self.rows @ X).mul_(self.damped.rsqrt().unsqueeze(1))

    def color(self, V: Tensor) -> Tensor:
        """Q diag(d)^1/2 V."""
        return self.rows.T @ (V * self.tempered.sqrt().unsqueeze(1))

    def dual(self, V: Tensor) -> Tensor:
        """Q diag(d)^-1/2 V."""
        return self.rows.T @ (V * self.tempered.rsqrt().unsqueeze(1))


class ByInverse(Root):
    """A tempered factor known by its inverse: the rest is made of that when it is asked for.

    Another process made it, or it was made in products alone (`kfacore.curvature.roots`).

    Args:
        inverse: D^-1.
        shift: c.
        power: p.
        name: (layer, factor), for messages.
    """

    def __init__(self, inverse: Tensor, shift: Tensor, power: float, name: Sequence[str]) -> None:
        self.inverse, self.shift, self.power = inverse, shift.to(inverse.dtype), power
        self.name = list(name)

    def state_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {"inverse": self.inverse, "shift": self.shift, "power": self.power, "name": self.name}

    @cached_property
    def whole(self) -> Tempered:
        """With eigenvectors, those of D^-1."""
        layer, factor = self.name
        values, vectors, _ = eigh_psd(self.inverse, layer, factor)
        tempered = values.reciprocal()
        damped = self.shift * (tempered / self.shift).clamp(min=1.0) ** (1.0 / self.power)
        return Tempered(vectors.mT.contiguous(), damped, tempered, self.inverse)

    def times(self, V: Tensor) -> Tensor:
        """D V."""
        return self.whole.times(V)

    def whiten(self, X: Tensor) -> Tensor:
        """See `Tempered.whiten`."""
        return self.whole.whiten(X)

    def color(self, V: Tensor) -> Tensor:
        """See `Tempered.color`."""
        return self.whole.color(V)

    def dual(self, V: Tensor) -> Tensor:
        """See `Tempered.dual`."""
        return self.whole.dual(V)


def temper(
    bases: Sequence[Tensor],
    shifts: Sequence[Tensor],
    names: Sequence[tuple[str, str]],
    power: float,
    *,
    vectors: bool = True,
) -> tuple[list[Tempered | ByInverse], list[Notice]]:
    """Compress the spectrum of damped factors, with one wait for the device in all, or two.

    Args:
        bases: Positive semi-definite X, symmetric up to rounding; not kept.
        shifts: c of each, scalars above 0.
        names: (layer, factor) of each, for notices.
        power: p in (0, 1].
        vectors: Whether roots are wanted, which eigenvectors give. Without them square roots are made in products
            alone where those are fast (`kfacore.host.products_are_fast`).

    Returns:
        D of each, and a notice for each eigenproblem that needed double precision.

    Raises:
        NumericalError: A factor is not finite, there is no damping, or an eigenproblem failed; names the layer.
    """
    by_products = power == 0.5 and not vectors and host.products_are_fast(bases[0].device)
    suited = ratios(bases, shifts) if by_products else [None] * len(bases)
    jobs = _Jobs(bases, shifts, names, power, suited)
    way = (lambda made: (made[0].inverse, made[1])), jobs.arrived
    done = in_batches(jobs.one, jobs.several, bases, EIGENPROBLEM, way)
    found = [factor for factor, _ in done]
    checks = torch.stack([check for _, check in done]).tolist()
    notices: list[Notice] = []
    again = [i for i, (solved, _) in enumerate(checks) if not solved and jobs.ratios[i] is not None]
    if again:  # too near to rounding for products
        better, notices = temper(
            [bases[i] for i in again], [shifts[i] for i in again], [names[i] for i in again], power
        )
        for i, factor in zip(again, better, strict=True):
            found[i], checks[i] = factor, [True, True]
    for i, (solved, fine) in enumerate(checks):
        if not solved:
            values, rows, notice = eigh_again(shifted(bases[i], shifts[i]), *names[i])
            found[i], right = powers_of(values, rows, shifts[i], power)
            notices.append(notice)
            fine = bool(right)
        if not fine:
            raise NumericalError(untempered(*names[i], shifts[i]))
    return found, notices


_Made = tuple[Tempered | ByInverse, Tensor]
"""A tempered factor, and two flags: whether it was solved, and whether its eigenvalues are finite and positive."""


@dataclass(frozen=True)
class _Jobs:
    """How factors are tempered, one by one or in batches.

    Attributes:
        ratios: Of those that are made in products alone (`kfacore.curvature.roots`), None for the others.
        here: What this process has made with eigenvectors.
    """

    bases: Sequence[Tensor]
    shifts: Sequence[Tensor]
    names: Sequence[tuple[str, str]]
    power: float
    ratios: Sequence[float | None]
    here: dict[int, Tempered] = field(default_factory=dict)

    def one(self, i: int) -> _Made:
        """The factor of an index."""
        if self.ratios[i] is not None:
            return self._in_products([i])[0]
        base, shift = self.bases[i], self.shifts[i]
        # Kept by nobody: what is alive here is alive once a core.
        values, vectors, count = try_eigh(shifted(base, shift), base.dtype)
        self.here[i], fine = powers_of(values, vectors, shift, self.power)
        return self.here[i], torch.stack([count >= 0, fine])

    def several(self, batch: list[int]) -> list[_Made]:
        """Factors of one size."""
        if all(self.ratios[i] is not None for i in batch):
            return self._in_products(batch)
        damped, adds = self._stacked(batch)
        values, vectors, solved = eigh_batch(damped)
        factors, fine = powers_of(values, vectors, adds, self.power)
        parts = [Tempered(*x) for x in zip(*(x.unbind() for x in vars(factors).values()), strict=True)]
        self.here.update(zip(batch, parts, strict=True))
        return list(zip(parts, torch.stack([solved, fine], 1), strict=True))

    def _in_products(self, batch: list[int]) -> list[_Made]:
        damped, adds = self._stacked(batch)
        Z, fine = inverse_roots(damped, adds, min(ratio for i in batch if (ratio := self.ratios[i]) is not None))
        inverses = Z.mul_(adds.to(Z.dtype).rsqrt()[:, None, None]).unbind()  # D = c^1/2 Xd^1/2
        pairs = zip(batch, inverses, strict=True)
        parts = [ByInverse(inverse, self.shifts[i], self.power, self.names[i]) for i, inverse in pairs]
        return list(zip(parts, torch.stack([fine, fine], 1), strict=True))

    def _stacked(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """X + c I of some, (b, d, d), and their c, (b,)."""
        damped, adds = torch.stack([self.bases[i] for i in batch]), torch.stack([self.shifts[i] for i in batch])
        damped.diagonal(dim1=1, dim2=2).add_(adds.to(damped.dtype).unsqueeze(1))
        return damped, adds

    def arrived(self, i: int, inverse: Tensor, checks: Tensor) -> _Made:
        """A factor whose inverse another process has sent, or this one to the others."""
        own = self.here.get(i)
        if own is None:
            return ByInverse(inverse, self.shifts[i], self.power, self.names[i]), checks
        return Tempered(own.rows, own.damped, own.tempered, inverse), checks


def untempered(layer: str, factor: str, shift: Tensor) -> str:
    """What to say of a factor whose powers are not finite and positive."""
    return (
        f"{layer}: factor {factor} cannot be tempered with a damping of {float(shift):g}; raise the damping "
        "(damping.lambda0, or gamma_min), or set approx.power to 1"
    )


def powers_of(values: Tensor, vectors: Tensor, shift: Tensor, power: float) -> tuple[Tempered, Tensor]:
    """The tempered factor, and whether its eigenvalues and those of its inverse are finite and positive.

    One, or a batch: values (b, d), vectors (b, d, d) and shifts (b,) give a batch of everything.
    """
    shift = shift.to(values.dtype).unsqueeze(-1)
    ratio = (values / shift).clamp(min=1.0)  # rounding must not undercut the damping
    tempered = ratio**power * shift
    damped, tempered, inverted = torch.stack([ratio * shift, tempered, 1.0 / tempered]).to(vectors.dtype)
    # LAPACK's vectors lie column by column: as rows they are in the order that a checkpoint restores.
    rows = vectors.mT.contiguous()
    fine = torch.isfinite(inverted) & (inverted > 0) & torch.isfinite(tempered) & (damped > 0)
    return Tempered(rows, damped, tempered, (rows.mT * inverted.unsqueeze(-2)) @ rows), fine.all(-1)
