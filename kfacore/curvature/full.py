r"""A dense block of few parameters: scale and shift of a norm.

F = E[v v^T] with the gradient v of each case by the block's parameters, (d, d), one a group (a channel's scale and
shift, where all together would be too many); damped like the Fisher itself,

    U = (F + gamma^2 I)^-1 g,

or, tempered with an exponent p < 1, U = (gamma^2 ((F + gamma^2 I) / gamma^2)^p)^-1 g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfacore.curvature.batched import DampedBatch, Undamped, damp_batches, symmetric_batch
from kfacore.curvature.linalg import gammas_of
from kfacore.curvature.moments import add_products
from kfacore.roles.approx import Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moment, Moments
from kfacore.roles.samples import Samples
from kfacore.schema.slots import PiRule

__all__ = ["Full", "FullMoment"]


class FullMoment(Moment):
    """F = (1 / S) sum over passes and cases of v v^T, (d_in, d_in), with the groups in front if there are several."""

    symmetric = True

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Blocks of kind ``"full"``."""
        return block.kind == "full"

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a block."""
        return [(*((b.groups,) if b.groups > 1 else ()), b.d_in, b.d_in) for b in layers]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """One product a block."""
        for value, s, b, a in zip(values, samples, beta, alpha, strict=True):
            if s is not None:
                rows = s.gradients.flatten(0, 1)
                add_products(value, rows, rows, b, a)


class FullInverse(Inverse):
    """F + gamma^2 I and its inverse, group by group.

    Args:
        layers: The blocks.
        matrices: One a block.
        notices: What needed more than the parameters' precision.
    """

    def __init__(
        self, layers: Sequence[Block], matrices: Sequence[DampedBatch], notices: Sequence[Notice] = ()
    ) -> None:
        self.layers, self.notices = layers, tuple(notices)
        self._matrices = list(matrices)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """(F + gamma^2 I)^-1 v."""
        return [_times(V, m.inverse) for V, m in zip(blocks, self._matrices, strict=True)]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """(F + gamma^2 I) v."""
        return [_times(V, m.damped) for V, m in zip(blocks, self._matrices, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {"matrices": [dict(vars(m)) for m in self._matrices]}

    def _like(self) -> Tensor:
        return self._matrices[0].inverse


def _times(V: Tensor, X: Tensor) -> Tensor:
    """X v for v in rows: (1, d) or (groups, 1, d), and X symmetric."""
    return (V if V.dim() == 3 else V.unsqueeze(0)).matmul(X).reshape(V.shape)


class FullFactorisation(Factorisation):
    """Copies of F, shared by all candidates of gamma."""

    def __init__(self, moments: Moments, power: float) -> None:
        self._layers, self._power = moments.layers, power
        values = zip(self._layers, moments[FullMoment], strict=True)
        self._F = [symmetric_batch(F, block.groups, diagonal=False) for block, F in values]

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> FullInverse:
        """F + gamma^2 I, tempered; pi has nothing to split."""
        shifts = gammas_of(gamma.square(), len(self._layers))
        items = [
            Undamped(F, shift.expand(len(F)), block.name, "F")
            for block, F, shift in zip(self._layers, self._F, shifts, strict=True)
        ]
        return FullInverse(self._layers, *damp_batches(items, self._power))


class Full:
    """Curvature of blocks of kind ``"full"``.

    Args:
        power: Exponent of `kfacore.curvature.tempering`.
    """

    moments = (FullMoment,)
    damps_each = True

    def __init__(self, power: float = 1.0) -> None:
        self._power = power

    def factorise(self, moments: Moments) -> FullFactorisation:
        """Copies of F."""
        return FullFactorisation(moments, self._power)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> FullInverse:
        """From the matrices."""
        return FullInverse(layers, [DampedBatch(**m) for m in state["matrices"]])
