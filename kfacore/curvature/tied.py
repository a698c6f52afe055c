r"""One weight W (V, d) used as embedding and as head: a sum of two Kronecker products.

As a head W has rows of the last hidden layer and gradients of the outputs, as an embedding one-hot rows and gradients
of what was looked up. The Fisher block of both uses together, without their cross terms, acts on U of (V, d) as

    F-hat U = G_head U A_head + A_emb U G_emb,        A_emb diagonal: the tokens' frequencies.

Both products are damped at gamma / sqrt(2), each with its own pi, so that they add gamma^2 together. The inverse is
exact. With D for damped, two generalised eigenproblems

    S^T D(G_head) S = diag(p),  S^T D(A_emb) S = I,        T^T D(G_emb) T = diag(t),  T^T D(A_head) T = I

turn it into a division: U = S [(S^T V T) / (p_i + t_j)] T^T. With a diagonal G_head (a vocabulary above the largest
side) S is diagonal too. An exponent p < 1 tempers each damped factor, as everywhere (`kfacore.curvature.tempering`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfacore.curvature.batched import Undamped, apply_sides, damp_batches, symmetric_batch
from kfacore.curvature.kron import mean_of_logs, split_of
from kfacore.curvature.linalg import EIGENPROBLEM, eigh_psd, gammas_of
from kfacore.curvature.moments import add_products, add_squares, frequencies
from kfacore.errors import NumericalError
from kfacore.parallel.cores import share
from kfacore.roles.approx import Factorisation
from kfacore.roles.block import Block, Side
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moment, Moments, Number, Tally, blend, divisor_of
from kfacore.roles.samples import LayerSamples, Samples
from kfacore.schema.slots import PiRule

__all__ = ["Tied", "TiedMoment"]

_NAMES = ("A_head", "G_head", "A_emb", "G_emb")


class TiedMoment(Moment):
    """A_head (d, d), G_head (V, V) or its diagonal (V,), A_emb (V,) and G_emb (d, d) of every block, in this order."""

    symmetric = True

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Blocks of kind ``"tied"``."""
        return block.kind == "tied"

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """Four a block."""
        d = [(block.d_in, block.d_in) for block in layers]
        words = [(block.d_out,) for block in layers]
        outputs = [w * (2 if b.output_side is Side.FULL else 1) for w, b in zip(words, layers, strict=True)]
        return [*d, *outputs, *words, *d]

    def tallies(self, samples: Samples) -> list[Tally]:
        """Rows of each use for its A, S for its G."""
        total = divisor_of(samples)
        emb: list[Number] = [0 if s is None else s.rows for s in samples]
        head: list[Number] = [0 if s is None or s.head is None else s.head.rows for s in samples]
        return [
            *(Tally(rows, rows) for rows in head),
            *(Tally(total, rows) for rows in head),
            *(Tally(rows, rows) for rows in emb),
            *(Tally(total, rows) for rows in emb),
        ]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """One sum a value."""
        n = len(self.layers)
        for i, s in enumerate(samples):
            if s is None:
                continue
            if s.head is not None:
                self._head(values, s.head, i, beta, alpha)
            words, gradients = 2 * n + i, 3 * n + i
            new = frequencies(s.inputs, self.layers[i].d_out, values[words])
            blend(values[words], new, beta[words], alpha[words])
            g = s.gradients.flatten(0, 1)
            add_products(values[gradients], g, g, beta[gradients], alpha[gradients])

    def _head(
        self, values: Sequence[Tensor], s: LayerSamples, i: int, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        out = len(self.layers) + i
        add_products(values[i], s.inputs, s.inputs, beta[i], alpha[i])
        g = s.gradients.flatten(0, 1)
        if values[out].dim() == 1:
            add_squares(values[out], g, beta[out], alpha[out])
        else:
            add_products(values[out], g, g, beta[out], alpha[out])


@dataclass(frozen=True)
class Pencil:
    """The damped sum of two products with its inverse.

    Attributes:
        A_head: D(A_head), (1, d, d).
        G_head: D(G_head), (1, V, V) or (1, V).
        A_emb: D(A_emb), (1, V).
        G_emb: D(G_emb), (1, d, d).
        S: (1, V, V), or (1, V) if that is diagonal.
        p: (V,).
        T: (d, d).
        t: (d,).
    """

    A_head: Tensor
    G_head: Tensor
    A_emb: Tensor
    G_emb: Tensor
    S: Tensor
    p: Tensor
    T: Tensor
    t: Tensor

    def solve(self, V: Tensor) -> Tensor:
        """S [(S^T V T) / (p_i + t_j)] T^T."""
        inner = apply_sides(self.S.mT if self.S.dim() == 3 else self.S, V, self.T.unsqueeze(0))
        inner = inner / (self.p.unsqueeze(1) + self.t)
        return apply_sides(self.S, inner, self.T.T.unsqueeze(0))

    def multiply(self, V: Tensor) -> Tensor:
        """D(G_head) V D(A_head) + D(A_emb) V D(G_emb)."""
        return apply_sides(self.G_head, V, self.A_head) + apply_sides(self.A_emb, V, self.G_emb)


def _pencil(head_A: Tensor, head_G: Tensor, emb_A: Tensor, emb_G: Tensor, name: str) -> tuple[Pencil, list[Notice]]:
    """Solve both eigenproblems; the metric of each is whitened first."""
    notices: list[Notice] = []
    scale = emb_A[0].rsqrt()
    if head_G.dim() == 2:
        S, p = scale.unsqueeze(0), head_G[0] / emb_A[0]
    else:
        p, E, notices = eigh_psd(head_G[0] * scale.unsqueeze(1) * scale, name, "G_head")
        S = (E * scale.unsqueeze(1)).contiguous().unsqueeze(0)
    q, E, more = eigh_psd(head_A[0], name, "A_head")
    white = E * q.clamp_min(torch.finfo(q.dtype).tiny).rsqrt()
    t, F, last = eigh_psd(white.T @ emb_G[0] @ white, name, "G_emb")
    T = (white @ F).contiguous()
    return Pencil(head_A, head_G, emb_A, emb_G, S, p, T, t), [*notices, *more, *last]


class TiedInverse(Inverse):
    """The damped sum of two products of each block.

    Args:
        layers: The blocks.
        pencils: One a block.
        notices: What needed more than the parameters' precision.
    """

    def __init__(self, layers: Sequence[Block], pencils: Sequence[Pencil], notices: Sequence[Notice] = ()) -> None:
        self.layers, self.notices = layers, tuple(notices)
        self._pencils = list(pencils)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Exactly, by two generalised eigenproblems."""
        return [pencil.solve(V) for pencil, V in zip(self._pencils, blocks, strict=True)]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """G_head V A_head + A_emb V G_emb, all four damped."""
        return [pencil.multiply(V) for pencil, V in zip(self._pencils, blocks, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {"pencils": [dict(vars(pencil)) for pencil in self._pencils]}

    def _like(self) -> Tensor:
        return self._pencils[0].T


class TiedFactorisation(Factorisation):
    """Copies of the four factors of each block, shared by all candidates of gamma."""

    def __init__(self, moments: Moments, power: float) -> None:
        self._layers, self._power = moments.layers, power
        values, n = moments[TiedMoment], len(moments.layers)
        self._factors = [
            tuple(symmetric_batch(X, 1, diagonal=X.dim() == 1) for X in values[i : 4 * n : n]) for i in range(n)
        ]

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Each product counts once."""
        return mean_of_logs([(f[k], f[k + 1]) for f in self._factors for k in (0, 2)])

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> TiedInverse:
        """Damp both products at gamma / sqrt(2), temper and invert; ``pi = "net"`` is the mean over these blocks alone.

        Raises:
            NumericalError: A factor is not finite, or an eigenproblem failed; names the block.
        """
        logs, each = self.log_pi(), gammas_of(gamma / math.sqrt(2.0), len(self._layers))
        if pi == "net" and logs is not None:
            pi = (logs[0] / logs[1].clamp_min(1)).exp()
        items = []
        for factors, own in zip(self._factors, each, strict=True):
            for A, G in (factors[:2], factors[2:]):
                split = split_of(A, G, pi).to(gamma.dtype)
                items += [(A, split * own), (G, own / split)]
        undamped = [Undamped(X, shift, self._layers[k // 4].name, _NAMES[k % 4]) for k, (X, shift) in enumerate(items)]
        found, notices = self._temper(undamped)
        jobs, costs = [], []
        for i, block in enumerate(self._layers):
            head_A, head_G, emb_A, emb_G = found[4 * i : 4 * i + 4]
            jobs.append(partial(_pencil, head_A, head_G, emb_A, emb_G, block.name))
            costs.append(EIGENPROBLEM * sum(item.cost for item in undamped[4 * i : 4 * i + 4]))
        pencils = share(jobs, costs, gamma.device)
        inverse = [pencil for pencil, _ in pencils]
        self._check(inverse)
        return TiedInverse(self._layers, inverse, [*notices, *(x for _, more in pencils for x in more)])

    def _temper(self, items: Sequence[Undamped]) -> tuple[list[Tensor], list[Notice]]:
        """Damped factors; where nothing is tempered nothing is inverted either: the eigenproblems will tell."""
        if self._power < 1.0:
            found, notices = damp_batches(items, self._power)
            return [batch.damped for batch in found], notices
        plain = []
        for item in items:
            shift = item.shift.to(item.X.dtype)
            if item.X.dim() == 2:
                plain.append(item.X + shift.unsqueeze(1))
            else:
                plain.append(item.X.clone())
                plain[-1].diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        return plain, []

    def _check(self, pencils: Sequence[Pencil]) -> None:
        """Positive and finite, with one wait for all."""
        lowest = [torch.stack([x.p.min() + x.t.min(), x.S.isfinite().all() & x.T.isfinite().all()]) for x in pencils]
        for block, (smallest, finite) in zip(self._layers, torch.stack(lowest).tolist(), strict=True):
            if not (finite and smallest > 0 and math.isfinite(smallest)):
                raise NumericalError(
                    f"{block.name}: the curvature of its two uses (embedding and head) has NaN or infinite entries, or "
                    "is not positive; check the data, or raise the damping (damping.lambda0, or gamma_min)"
                )


class Tied:
    """Curvature of blocks of kind ``"tied"``.

    Args:
        power: Exponent of `kfacore.curvature.tempering`, factor by factor.
    """

    moments = (TiedMoment,)
    damps_each = True

    def __init__(self, power: float = 1.0) -> None:
        self._power = power

    def factorise(self, moments: Moments) -> TiedFactorisation:
        """Copies of the factors."""
        return TiedFactorisation(moments, self._power)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> TiedInverse:
        """From the pencils."""
        return TiedInverse(layers, [Pencil(**pencil) for pencil in state["pencils"]])
