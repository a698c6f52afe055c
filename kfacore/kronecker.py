r"""Damped Kronecker factors of every layer: the common ground of Kronecker-factored approximations.

Factored Tikhonov damping (method, section 3; paper, section 6.3):

    Ad_i = A_i + pi_i gamma I,     Gd_i = G_i + (gamma / pi_i) I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.layers import LayerInfo
from kfacore.linalg import Spd, factor_spd, pi_of
from kfacore.roles.approx import Notice

__all__ = ["DampedFactors", "damp", "symmetric"]


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


def damp(
    layers: Sequence[LayerInfo],
    A: Sequence[Tensor],
    G: Sequence[Tensor],
    gamma: Tensor,
    *,
    pi: bool,
    keep_lower: bool = True,
) -> tuple[DampedFactors, list[Tensor], list[Tensor], tuple[Notice, ...]]:
    """Damp and invert the factors of all layers.

    Args:
        layers: The layers.
        A: Symmetric input factors.
        G: Symmetric output factors.
        gamma: Strength, a scalar on the device.
        pi: Split gamma by trace norms; otherwise add it to both factors as it is.
        keep_lower: Whether the Cholesky factors are wanted.

    Returns:
        The damped factors, the Cholesky factors of Ad and of Gd if wanted, and notices.

    Raises:
        NumericalError: A factor could not be factorised; names the layer.
    """
    shifts_A, shifts_G = [], []
    for a, g in zip(A, G, strict=True):
        split = pi_of(a, g).to(gamma.dtype) if pi else torch.ones_like(gamma)
        shifts_A.append(split * gamma)
        shifts_G.append(gamma / split)
    names = [(layer.name, side) for side in "AG" for layer in layers]
    factors, lower, notices = factor_spd([*A, *G], [*shifts_A, *shifts_G], names, keep_lower=keep_lower)
    count = len(layers)
    return DampedFactors(factors[:count], factors[count:]), lower[:count], lower[count:], tuple(notices)
