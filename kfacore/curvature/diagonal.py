r"""The diagonal of the Fisher, for parameters that no layer reads.

The block is one row of d parameters. Its samples are rows whose squares add up to an unbiased estimate of S times the
diagonal D, damped like the Fisher itself:

    u = v / (D + gamma^2),       or, tempered with an exponent p < 1,   u = v / (gamma^2 ((D + gamma^2) / gamma^2)^p).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfacore.curvature.batched import DampedBatch, Undamped, damp_batches
from kfacore.curvature.linalg import gammas_of
from kfacore.curvature.moments import add_squares
from kfacore.roles.approx import Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment, Moments
from kfacore.roles.samples import Samples
from kfacore.schema.slots import PiRule

__all__ = ["Entries", "SquareMoment"]


class SquareMoment(Moment):
    """D = (1 / S) sum over rows of their squares, (size,)."""

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Blocks of kind ``"diagonal"``."""
        return block.kind == "diagonal"

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a block."""
        return [(block.size,) for block in layers]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """One sum of squares a block."""
        for value, s, b, a in zip(values, samples, beta, alpha, strict=True):
            if s is not None:
                add_squares(value, s.gradients.flatten(0, 1), b, a)


class EntriesInverse(Inverse):
    """D + gamma^2, entry by entry.

    Args:
        layers: The blocks.
        entries: One a block.
    """

    def __init__(self, layers: Sequence[Block], entries: Sequence[DampedBatch]) -> None:
        self.layers = layers
        self._entries = list(entries)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """V / (D + gamma^2)."""
        return [V / e.damped.view_as(V) for V, e in zip(blocks, self._entries, strict=True)]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """V (D + gamma^2)."""
        return [V * e.damped.view_as(V) for V, e in zip(blocks, self._entries, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {"entries": [dict(vars(e)) for e in self._entries]}

    def _like(self) -> Tensor:
        return self._entries[0].damped


class EntriesFactorisation(Factorisation):
    """Copies of D, shared by all candidates of gamma."""

    def __init__(self, moments: Moments, power: float) -> None:
        self._layers, self._power = moments.layers, power
        self._D = [D.unsqueeze(0).clone() for D in moments[SquareMoment]]

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> EntriesInverse:
        """D + gamma^2, tempered; pi has nothing to split."""
        shifts = gammas_of(gamma.square(), len(self._layers))
        items = [
            Undamped(D, shift.expand(1), block.name, "F")
            for block, D, shift in zip(self._layers, self._D, shifts, strict=True)
        ]
        return EntriesInverse(self._layers, damp_batches(items, self._power)[0])


class Entries:
    """Curvature of blocks of kind ``"diagonal"``.

    Args:
        power: Exponent of `kfacore.curvature.tempering`.
    """

    moments = (SquareMoment,)
    damps_each = True

    def __init__(self, power: float = 1.0) -> None:
        self._power = power

    def factorise(self, moments: Moments) -> EntriesFactorisation:
        """Copies of D."""
        return EntriesFactorisation(moments, self._power)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> EntriesInverse:
        """From the damped diagonals."""
        return EntriesInverse(layers, [DampedBatch(**e) for e in state["entries"]])
