r"""Damped matrices in batches: many small ones of one size, or one alone; and diagonals, which are vectors.

For X of (b, d, d) and a shift c of each

    D = X + c I,   or with an exponent p < 1   D = c ((X + c I) / c)^p   (see `kfacore.curvature.tempering`),

and D^-1. A diagonal (b, d) is the same entry by entry. Everything is checked with one wait for the device in all; a
matrix that failed is tried again alone, in double precision and then with jitter, as in `kfacore.curvature.linalg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kfacore.curvature.linalg import EIGENPROBLEM, cholesky_batch, eigh_again, eigh_batch, factor_again
from kfacore.curvature.tempering import powers_of, untempered
from kfacore.errors import NumericalError
from kfacore.parallel.cores import share
from kfacore.parallel.division import Wire
from kfacore.parallel.triangles import folded, unfolded
from kfacore.roles.inverse import Notice

__all__ = ["DampedBatch", "Undamped", "apply_sides", "damp_batches", "symmetric_batch"]


@dataclass(frozen=True)
class Undamped:
    """What is to be damped.

    Attributes:
        X: Positive semi-definite and symmetric, (b, d, d), or diagonals, (b, d).
        shift: c of each, (b,), at least 0.
        layer: Name of the block.
        factor: Name of the factor.
    """

    X: Tensor
    shift: Tensor
    layer: str
    factor: str

    @property
    def cost(self) -> float:
        """Operations of a Cholesky factor and inverse of each."""
        return float(self.X.shape[0] * self.X.shape[1] ** (3 if self.X.dim() == 3 else 1))


@dataclass(frozen=True)
class DampedBatch:
    """Damped matrices with their inverses.

    Attributes:
        damped: D, (b, d, d), or diagonals, (b, d).
        inverse: D^-1, likewise.
    """

    damped: Tensor
    inverse: Tensor


def symmetric_batch(X: Tensor, groups: int, *, diagonal: bool) -> Tensor:
    """A copy of a moment's value as a batch, exactly symmetric, which later updates do not change."""
    batch = X if groups > 1 else X.unsqueeze(0)
    return batch.clone() if diagonal else (batch + batch.mT).mul_(0.5)


def damp_batches(items: Sequence[Undamped], power: float = 1.0) -> tuple[list[DampedBatch], list[Notice]]:
    """Damp, temper and invert.

    Args:
        items: The matrices; not changed.
        power: p in (0, 1].

    Raises:
        NumericalError: Something is not finite, or could not be factorised at all; names the block.
    """
    if not items:
        return [], []
    jobs = [partial(_one, item, power) for item in items]
    costs = [item.cost * (1 if power == 1.0 else EIGENPROBLEM) for item in items]

    def unpack(i: int, tensors: list[Tensor], _: None) -> tuple[DampedBatch, Tensor]:
        return _unpacked(items[i], tensors, power)

    done = share(jobs, costs, items[0].X.device, Wire(partial(_packed, power=power), unpack))
    good = torch.cat([fine for _, fine in done]).tolist()
    found, notices, start = [], list[Notice](), 0
    for item, (batch, fine) in zip(items, done, strict=True):
        wrong = [i for i in range(len(fine)) if not good[start + i]]
        start += len(fine)
        for i in wrong:
            notices += _again(item, i, batch, power)
        found.append(batch)
    return found, notices


def _packed(found: tuple[DampedBatch, Tensor], power: float) -> tuple[list[Tensor], None]:
    """A result on its way to other processes: what cannot be made there in a moment."""
    batch, fine = found
    if batch.inverse.dim() == 2:
        return [], None
    matrices = [batch.inverse] if power == 1.0 else [batch.inverse, batch.damped]
    return [fine.to(batch.inverse.dtype), *(folded(X) for X in matrices)], None


def _unpacked(item: Undamped, tensors: list[Tensor], power: float) -> tuple[DampedBatch, Tensor]:
    shift = item.shift.to(item.X.dtype).unsqueeze(1)
    if not tensors:
        return _diagonal(item.X, shift, power)
    fine, *matrices = tensors
    inverse, *rest = (unfolded(X, item.X.shape[1]) for X in matrices)
    return DampedBatch(rest[0] if rest else _shifted(item.X, shift), inverse), fine.bool()


def _shifted(X: Tensor, shift: Tensor) -> Tensor:
    damped = X.clone()
    damped.diagonal(dim1=1, dim2=2).add_(shift)
    return damped


def _one(item: Undamped, power: float) -> tuple[DampedBatch, Tensor]:
    """One batch, and which of its matrices are right, (b,)."""
    shift = item.shift.to(item.X.dtype)
    if item.X.dim() == 2:
        return _diagonal(item.X, shift.unsqueeze(1), power)
    damped = _shifted(item.X, shift.unsqueeze(1))
    if power < 1.0:
        return _tempered(damped, item.shift, power)
    _, inverse, fine = cholesky_batch(damped)
    return DampedBatch(damped, inverse), fine


def _diagonal(x: Tensor, shift: Tensor, power: float) -> tuple[DampedBatch, Tensor]:
    damped = x + shift if power == 1.0 else shift * ((x + shift) / shift) ** power
    inverse = 1.0 / damped
    fine = torch.isfinite(damped) & (damped > 0) & torch.isfinite(inverse) & (inverse > 0)
    return DampedBatch(damped, inverse), fine.all(1)


def _tempered(damped: Tensor, shift: Tensor, power: float) -> tuple[DampedBatch, Tensor]:
    values, vectors, solved = eigh_batch(damped)
    factor, fine = powers_of(values, vectors, shift, power)
    whole = (factor.rows.mT * factor.tempered.unsqueeze(1)) @ factor.rows
    return DampedBatch(whole, factor.inverse), solved & fine


def _again(item: Undamped, i: int, batch: DampedBatch, power: float) -> list[Notice]:
    """Matrix i of a batch alone; written over the batch's."""
    X, shift = item.X[i], item.shift[i]
    if X.dim() == 1:
        if not bool(torch.isfinite(X).all()):
            raise NumericalError(
                f"{item.layer}: factor {item.factor} has NaN or infinite entries; the forward or backward pass "
                "overflowed. Check the data and the initialisation, or start with a larger damping"
            )
        raise NumericalError(
            f"{item.layer}: factor {item.factor} is 0 somewhere and a damping of {float(shift):g} adds nothing to it; "
            "raise the damping (damping.lambda0, or gamma_min)"
        )
    if power == 1.0:
        found, _, notice = factor_again(X, shift, item.layer, item.factor)
        batch.inverse[i] = found.inverse
        batch.damped[i] = X
        batch.damped[i].diagonal().add_(found.shift)
        return [notice]
    damped = X.clone()
    damped.diagonal().add_(shift.to(X.dtype))
    values, vectors, notice = eigh_again(damped, item.layer, item.factor)
    factor, fine = powers_of(values, vectors, shift, power)
    if not bool(fine):
        raise NumericalError(untempered(item.layer, item.factor, shift))
    batch.inverse[i] = factor.inverse
    batch.damped[i] = (factor.rows.T * factor.tempered) @ factor.rows
    return [notice]


def apply_sides(
    G: Tensor,  # (groups, d_out, d_out), or diagonals (groups, d_out)
    V: Tensor,  # (groups, d_out, d_in), or (d_out, d_in)
    A: Tensor,  # (groups, d_in, d_in), or diagonals (groups, d_in)
) -> Tensor:
    """G V A, group by group, in the shape of V."""
    W = V if V.dim() == 3 else V.unsqueeze(0)
    W = G.unsqueeze(2) * W if G.dim() == 2 else G @ W
    W = W * A.unsqueeze(1) if A.dim() == 2 else W @ A
    return W.reshape(V.shape)
