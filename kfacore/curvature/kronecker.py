r"""Damped Kronecker factors of every layer: the common ground of Kronecker-factored approximations.

Factored Tikhonov damping (method, section 3; paper, section 6.3):

    Ad_i = A_i + pi_i gamma I,     Gd_i = G_i + (gamma / pi_i) I.

Tempered with an exponent p < 1, each is replaced by a power of itself: see `kfacore.curvature.tempering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacore.curvature.linalg import factor_spd, gammas_of, pi_of
from kfacore.curvature.spd import CholeskyRoot, Root, Spd
from kfacore.curvature.tempering import ByInverse, Tempered, temper
from kfacore.roles.block import Block
from kfacore.roles.inverse import Notice
from kfacore.schema.slots import PiRule

__all__ = ["Damped", "DampedFactors", "damp", "ready", "symmetric"]

Factor = Spd | Tempered | ByInverse


def symmetric(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies made exactly symmetric, which later updates of the originals do not change."""
    return [(value + value.T).mul_(0.5) for value in values]


def ready(values: Sequence[Tensor], power: float) -> list[Tensor]:
    """What `damp` wants: copies that its factors may keep; tempered factors keep nothing of the moments."""
    return symmetric(values) if power == 1.0 else list(values)


@dataclass(frozen=True)
class DampedFactors:
    """Ad and Gd of each layer, with their inverses.

    Attributes:
        A: One a layer, (d_in, d_in).
        G: One a layer, (d_out, d_out).
    """

    A: list[Factor]
    G: list[Factor]

    def solve(self, i: int, V: Tensor, out: Tensor | None = None) -> Tensor:
        """Gd_i^-1 V Ad_i^-1, in ``out`` if given."""
        return torch.mm(self.G[i].inverse @ V, self.A[i].inverse, out=out)

    def multiply(self, i: int, V: Tensor) -> Tensor:
        """Gd_i V Ad_i."""
        return self.A[i].times(self.G[i].times(V).T).T

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        sides = ("A", self.A), ("G", self.G)
        return {side: [_state_of(f) for f in own] for side, own in sides}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DampedFactors:
        """Restore from `state_dict`."""
        A, G = ([_factor_of(f) for f in state[side]] for side in ("A", "G"))
        return cls(A, G)


def _state_of(factor: Factor) -> dict[str, Any]:
    return factor.state_dict() if isinstance(factor, ByInverse) else dict(vars(factor))


def _factor_of(state: Mapping[str, Any]) -> Factor:
    if "base" in state:
        return Spd(**state)
    return ByInverse(**state) if "power" in state else Tempered(**state)


class Damped(NamedTuple):
    """What `damp` found.

    Attributes:
        factors: Ad and Gd, with their inverses.
        roots: Roots of Ad under ``"A"`` and of Gd under ``"G"``, one a layer; empty if not wanted.
        notices: What must be reported.
    """

    factors: DampedFactors
    roots: dict[str, list[Root]]
    notices: tuple[Notice, ...]


def damp(
    layers: Sequence[Block],
    A: Sequence[Tensor],
    G: Sequence[Tensor],
    gamma: Tensor,
    *,
    pi: PiRule | Tensor,
    power: float = 1.0,
    keep_roots: bool = True,
) -> Damped:
    """Damp, temper and invert the factors of all layers.

    Args:
        layers: The layers.
        A: Input factors, as `ready` gives them.
        G: Output factors, likewise.
        gamma: Strength, a scalar on the device, or one for each layer.
        pi: How gamma is split, see `pi_of`.
        power: Exponent of `kfacore.curvature.tempering.temper`; 1 leaves the factors as they are.
        keep_roots: Whether roots, which cross moments need, are wanted.

    Raises:
        NumericalError: A factor could not be factorised; names the layer.
    """
    splits = [split.to(gamma.dtype) for split in pi_of(A, G, pi)]
    gammas = gammas_of(gamma, len(splits))
    shifts = [
        *(split * own for split, own in zip(splits, gammas, strict=True)),
        *(own / split for split, own in zip(splits, gammas, strict=True)),
    ]
    names = [(layer.name, side) for side in "AG" for layer in layers]
    factors: Sequence[Factor]
    roots: Sequence[Root]
    if power == 1.0:
        factors, lower, notices = factor_spd([*A, *G], shifts, names, keep_lower=keep_roots)
        roots = [CholeskyRoot(L, factor) for L, factor in zip(lower, factors, strict=keep_roots)]
    else:
        factors, notices = temper([*A, *G], shifts, names, power, vectors=keep_roots)
        roots = factors if keep_roots else []
    count = len(layers)
    return Damped(
        DampedFactors(list(factors[:count]), list(factors[count:])),
        {"A": list(roots[:count]), "G": list(roots[count:])},
        tuple(notices),
    )
