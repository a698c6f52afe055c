"""What is preconditioned together: plain facts about a block of parameters. Knows nothing of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

__all__ = ["Block", "Kind", "Side", "share_of"]

Kind = Literal["kron", "full", "diagonal", "tied"]
"""Form of a block's curvature: a Kronecker product, a dense matrix, a diagonal, or one weight used as embedding and as
head."""


class Side(StrEnum):
    """What is kept of one factor of a Kronecker product."""

    FULL = "full"
    """The whole matrix."""
    DIAGONAL = "diagonal"
    """Its diagonal: sides above ``approx.max_dim``, and the input side of an embedding, which is diagonal anyway."""


@dataclass(frozen=True)
class Block:
    """Parameters that are preconditioned together, as one matrix V of shape (d_out, d_in), or (groups, d_out, d_in).

    Attributes:
        name: Qualified name in the model: a module's, with what follows where the module has several.
        d_in: Width of the homogeneous input abar: inputs plus 1 if there is a bias. For a kind other than ``"kron"``
            the number of parameters of a group (d_out is then 1), for ``"tied"`` the width of the embedding.
        d_out: Number of units of a group.
        bias: Whether the last column is a bias.
        groups: Matrices of the same shape, each with curvature of its own (grouped convolutions; channels of a norm).
        kind: Form of the curvature.
        input_side: What is kept of A.
        output_side: What is kept of G.
        params: Qualified names of the parameters, with the rows where it is a slice: ``"att.in_proj_weight[0:4]"``.
        why: Why it is treated like this, for `KFAC.explain`; empty where it is the usual.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    groups: int = 1
    kind: Kind = "kron"
    input_side: Side = Side.FULL
    output_side: Side = Side.FULL
    params: tuple[str, ...] = ()
    why: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of V: (d_out, d_in), with the groups in front if there are several."""
        return (self.d_out, self.d_in) if self.groups == 1 else (self.groups, self.d_out, self.d_in)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.groups * self.d_out * self.d_in

    @property
    def plain(self) -> bool:
        """Whether it is one Kronecker product of two whole factors: what every approximation can serve."""
        whole = self.input_side is Side.FULL and self.output_side is Side.FULL
        return self.kind == "kron" and self.groups == 1 and whole


_ALIKE, _FEWEST = 2, 4
"""Positions that count as one case, and cases that are enough at the earliest: positions of a case resemble each other.
With fewer, more steps were undone on text: docs/notes/2026-11-real.md."""


def share_of(cases: int, share: float, least: int = 1, positions: int = 1) -> int:
    """The first ceil(share * cases) cases, at least one; immune to rounding of the product.

    Args:
        cases: Size of the mini-batch.
        share: tau_1 or tau_2, in (0, 1].
        least: No fewer than this, as far as there are so many. Two positions of outputs count as one, but four cases
            are the fewest.
        positions: Positions that a case has at least, R: 1 for outputs (n, o).

    Returns:
        A number of cases in 1..cases.
    """
    enough = min(least, max(_FEWEST, math.ceil(_ALIKE * least / positions)))
    return min(cases, max(enough, math.ceil(share * cases - 1e-9)))
