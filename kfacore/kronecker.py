r"""Damped Kronecker factors of every layer: the common ground of Kronecker-factored approximations.

Factored Tikhonov damping (method, section 3; paper, section 6.3):

    Ad_i = A_i + pi_i gamma I,     Gd_i = G_i + (gamma / pi_i) I.

Tempered with an exponent p < 1, each is replaced by a power of itself, between the Fisher (p = 1) and plain gradient
descent (p = 0): partial curvature correction (Huh 2020; Amari et al. 2021 compare the ends and the middle).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacore.errors import NumericalError
from kfacore.layers import LayerInfo
from kfacore.linalg import Spd, eigh_again, factor_spd, pi_of, try_eigh
from kfacore.roles.approx import Notice

__all__ = ["Damped", "DampedFactors", "damp", "symmetric", "temper"]


def symmetric(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies made exactly symmetric, which later updates of the originals do not change."""
    return [(value + value.T).mul_(0.5) for value in values]


@dataclass(frozen=True)
class DampedFactors:
    """Ad and Gd of each layer, with their inverses.

    Attributes:
        A: One a layer, (d_in, d_in).
        G: One a layer, (d_out, d_out).
    """

    A: list[Spd]
    G: list[Spd]

    def solve(self, i: int, V: Tensor, out: Tensor | None = None) -> Tensor:
        """Gd_i^-1 V Ad_i^-1, in ``out`` if given."""
        return torch.mm(self.G[i].inverse @ V, self.A[i].inverse, out=out)

    def multiply(self, i: int, V: Tensor) -> Tensor:
        """Gd_i V Ad_i."""
        return self.A[i].times(self.G[i].times(V).T).T

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {
            side: [{"base": f.base, "shift": f.shift, "inverse": f.inverse} for f in factors]
            for side, factors in (("A", self.A), ("G", self.G))
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DampedFactors:
        """Restore from `state_dict`."""
        A, G = ([Spd(f["base"], f["shift"], f["inverse"]) for f in state[side]] for side in ("A", "G"))
        return cls(A, G)


class Damped(NamedTuple):
    """What `damp` found.

    Attributes:
        factors: Ad and Gd, with their inverses.
        lower: Cholesky factors of Ad under ``"A"`` and of Gd under ``"G"``, one a layer; empty if not wanted.
        roots: R of `temper` likewise, which carries cross moments over to tempered factors; empty if there is none.
        notices: What must be reported.
    """

    factors: DampedFactors
    lower: dict[str, list[Tensor]]
    roots: dict[str, list[Tensor]]
    notices: tuple[Notice, ...]


def damp(
    layers: Sequence[LayerInfo],
    A: Sequence[Tensor],
    G: Sequence[Tensor],
    gamma: Tensor,
    *,
    pi: bool,
    power: float = 1.0,
    keep_lower: bool = True,
) -> Damped:
    """Damp, temper and invert the factors of all layers.

    Args:
        layers: The layers.
        A: Symmetric input factors.
        G: Symmetric output factors.
        gamma: Strength, a scalar on the device.
        pi: Split gamma by trace norms; otherwise add it to both factors as it is.
        power: Exponent of `temper`; 1 leaves the factors as they are.
        keep_lower: Whether Cholesky factors and roots, which cross moments need, are wanted.

    Raises:
        NumericalError: A factor could not be factorised; names the layer.
    """
    shifts_A, shifts_G = [], []
    for a, g in zip(A, G, strict=True):
        split = pi_of(a, g).to(gamma.dtype) if pi else torch.ones_like(gamma)
        shifts_A.append(split * gamma)
        shifts_G.append(gamma / split)
    names = [(layer.name, side) for side in "AG" for layer in layers]
    bases, shifts = [*A, *G], [*shifts_A, *shifts_G]
    roots: list[Tensor] = []
    tempering: list[Notice] = []
    if power != 1.0:
        bases, roots, tempering = temper(bases, shifts, names, power, keep_roots=keep_lower)
        shifts = [torch.zeros_like(shift) for shift in shifts]
    factors, lower, notices = factor_spd(bases, shifts, names, keep_lower=keep_lower)
    count = len(layers)
    sides = {"A": slice(None, count), "G": slice(count, None)}
    return Damped(
        DampedFactors(factors[:count], factors[count:]),
        {side: lower[part] for side, part in sides.items()},
        {side: roots[part] for side, part in sides.items()},
        (*tempering, *notices),
    )


def temper(
    bases: Sequence[Tensor],
    shifts: Sequence[Tensor],
    names: Sequence[tuple[str, str]],
    power: float,
    *,
    keep_roots: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[Notice]]:
    r"""Compress the spectrum of damped factors: D = c (Xd / c)^p with Xd = X + c I.

    An eigenvalue x + c becomes c ((x + c) / c)^p: what the damping alone makes stays, what is far above it shrinks, and
    the matrix keeps its units. Layer by layer the block becomes gamma^2 (Ad (x) Gd / gamma^2)^p, whatever pi is.

    Args:
        bases: Symmetric positive semi-definite X.
        shifts: c of each, scalars above 0.
        names: (layer, factor) of each, for notices.
        power: p in (0, 1].
        keep_roots: Whether R is wanted.

    Returns:
        D of each, R = D^1/2 Xd^-1/2 of each if wanted, and a notice for each eigenproblem that needed double precision.

    Raises:
        NumericalError: A factor is not finite, there is no damping, or an eigenproblem failed; names the layer.
    """
    tempered, roots, checks = [], [], []
    for base, shift in zip(bases, shifts, strict=True):
        damped = _shifted(base, shift)
        values, vectors, count = try_eigh(damped, damped.dtype)
        D, R, fine = _powers(values, vectors, shift, power, keep_roots)
        tempered.append(D)
        roots += R
        checks.append(torch.stack([count >= 0, fine]))
    notices: list[Notice] = []
    for i, (solved, fine) in enumerate(torch.stack(checks).tolist()):  # one wait for the device in all
        if not solved:
            values, vectors, notice = eigh_again(_shifted(bases[i], shifts[i]), *names[i])
            tempered[i], roots[i : i + 1], again = _powers(values, vectors, shifts[i], power, keep_roots)
            notices.append(notice)
        if not (fine if solved else again):
            layer, factor = names[i]
            raise NumericalError(
                f"{layer}: factor {factor} cannot be tempered with a damping of {float(shifts[i]):g}; raise the "
                "damping (damping.lambda0, or gamma_min), or set approx.power to 1"
            )
    return tempered, roots, notices


def _shifted(base: Tensor, shift: Tensor) -> Tensor:
    damped = base.clone()
    damped.diagonal().add_(shift.to(base.dtype))
    return damped


def _powers(
    values: Tensor, vectors: Tensor, shift: Tensor, power: float, keep_root: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """D, R if wanted, and whether they are finite and positive."""
    ratio = (values / shift).clamp(min=1.0)  # rounding must not undercut the damping
    weights = torch.stack([shift * ratio**power, ratio ** (0.5 * (power - 1.0))]).to(vectors.dtype)
    D, *R = [(vectors * weight) @ vectors.T for weight in (weights if keep_root else weights[:1])]
    return D, R, torch.isfinite(weights).all() & (weights > 0).all()
