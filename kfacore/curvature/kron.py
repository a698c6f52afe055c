r"""Kronecker products with several groups or diagonal sides: convolutions in groups, embeddings, very wide layers.

A block is G (x) A for each group, with a pi of its own:

    U = (G + gamma / pi I)^-1 V (A + pi gamma I)^-1,     pi = sqrt((tr A / dim A) / (tr G / dim G)).

A diagonal side is a vector, and its inverse a division. Products of two whole factors are served as well, so this is
block-diagonal K-FAC for every block that is a Kronecker product at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.curvature.batched import DampedBatch, Undamped, apply_sides, damp_batches, symmetric_batch
from kfacore.curvature.linalg import balanced, gammas_of
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.roles.approx import Factorisation
from kfacore.roles.block import Block, Side
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments
from kfacore.schema.slots import PiRule

__all__ = ["Kron", "mean_of", "mean_of_logs", "split_of"]


def mean_of(X: Tensor) -> Tensor:
    """tr X / dim X of each matrix (b, d, d) or diagonal (b, d): (b,)."""
    return (X if X.dim() == 2 else X.diagonal(dim1=1, dim2=2)).mean(1)


def split_of(A: Tensor, G: Tensor, rule: PiRule | Tensor) -> Tensor:
    """pi of each group, (b,), by its rule: see `kfacore.curvature.linalg.pi_of`; ``"net"`` is that of these groups."""
    if rule is None:
        return torch.ones_like(mean_of(G))
    if isinstance(rule, Tensor):
        return rule.to(G.dtype).expand(len(G))
    pi, alive = balanced((mean_of(A) / mean_of(G)).sqrt())
    return pi if rule == "layer" else (pi.log().sum() / alive.sum().clamp_min(1)).exp().expand_as(pi)


def mean_of_logs(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Sum over blocks of log pi, each the mean over its groups that are alive, and how many blocks are alive."""
    if not factors:
        return None
    logs, alive = [], []
    for A, G in factors:
        pi, some = balanced((mean_of(A) / mean_of(G)).sqrt())
        logs.append(pi.log().sum() / some.sum().clamp_min(1))
        alive.append(some.any())
    return torch.stack(logs).sum(), torch.stack(alive).sum()


class KronInverse(Inverse):
    """F-hat = diag over blocks and groups of Ad (x) Gd.

    Args:
        layers: The blocks.
        A: Ad and its inverse, one a block.
        G: Gd and its inverse, one a block.
        notices: What needed more than the parameters' precision.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        A: Sequence[DampedBatch],
        G: Sequence[DampedBatch],
        notices: Sequence[Notice] = (),
    ) -> None:
        self.layers, self.notices = layers, tuple(notices)
        self._A, self._G = list(A), list(G)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Gd^-1 V Ad^-1, group by group."""
        return [apply_sides(G.inverse, V, A.inverse) for G, V, A in zip(self._G, blocks, self._A, strict=True)]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Gd V Ad, group by group."""
        return [apply_sides(G.damped, V, A.damped) for G, V, A in zip(self._G, blocks, self._A, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {side: [dict(vars(x)) for x in xs] for side, xs in (("A", self._A), ("G", self._G))}

    def _like(self) -> Tensor:
        return self._A[0].inverse


class KronFactorisation(Factorisation):
    """A and G, shared by all candidates of gamma."""

    def __init__(self, moments: Moments, power: float) -> None:
        self._layers, self._power = moments.layers, power
        sides = (
            (moments[InputFactor], [block.input_side for block in self._layers]),
            (moments[OutputFactor], [block.output_side for block in self._layers]),
        )
        self._A, self._G = (
            [
                symmetric_batch(X, block.groups, diagonal=side is Side.DIAGONAL)
                for block, X, side in zip(self._layers, values, kept, strict=True)
            ]
            for values, kept in sides
        )

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Each block counts once, however many groups it has."""
        return mean_of_logs(list(zip(self._A, self._G, strict=True)))

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> KronInverse:
        """Damp, temper and invert; ``pi = "net"`` is the mean over these blocks alone."""
        logs = self.log_pi()
        if pi == "net" and logs is not None:
            pi = (logs[0] / logs[1].clamp_min(1)).exp()
        A, G = list[Undamped](), list[Undamped]()
        gammas = gammas_of(gamma, len(self._layers))
        for block, a, g, own in zip(self._layers, self._A, self._G, gammas, strict=True):
            split = split_of(a, g, pi).to(gamma.dtype)
            A.append(Undamped(a, split * own, block.name, "A"))
            G.append(Undamped(g, own / split, block.name, "G"))
        found, notices = damp_batches([*A, *G], self._power)
        return KronInverse(self._layers, found[: len(A)], found[len(A) :], notices)


class Kron:
    """Curvature of Kronecker products that the approximation leaves to others.

    Args:
        power: Exponent of `kfacore.curvature.tempering`, factor by factor.
    """

    moments = (InputFactor, OutputFactor)
    damps_each = True

    def __init__(self, power: float = 1.0) -> None:
        self._power = power

    def factorise(self, moments: Moments) -> KronFactorisation:
        """Copies of A and G."""
        return KronFactorisation(moments, self._power)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> KronInverse:
        """From the damped factors."""
        A, G = ([DampedBatch(**x) for x in state[side]] for side in ("A", "G"))
        return KronInverse(layers, A, G)
