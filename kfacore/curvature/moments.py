r"""Second moments of Kronecker factors: the statistics that most approximations are made of.

With rows abar of a unit's inputs and g of its output gradients, rows and S as in `kfacore.roles.samples`,

    A = (1 / rows) sum of abar abar^T,        G = (1 / S) sum over passes and rows of g g^T,

with several groups one of each a group, (groups, d, d). A side that is diagonal keeps the squares alone, (d,) or
(groups, d); of token numbers, which stand for one-hot rows, those are the tokens' frequencies. The cross moments of a
pair of blocks (i, j) that share their positions are

    Ax = (1 / rows) sum of abar_i abar_j^T,    Gx = (1 / S) sum over passes and rows of g_i g_j^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kfacore.errors import UnsupportedModelError
from kfacore.roles.block import Block, Side
from kfacore.roles.moment import Moment, Tally, blend, divisor_of
from kfacore.roles.samples import LayerSamples, Samples

__all__ = [
    "InputCross",
    "InputFactor",
    "OutputCross",
    "OutputFactor",
    "add_products",
    "add_squares",
    "frequencies",
    "one_hot_rows",
]


_PART = 512
"""Rows that are summed at once, of narrow factors."""
_NARROW = 16
"""Columns below which a factor is summed in parts."""


def add_products(value: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float) -> None:
    """value <- beta value + alpha X^T Y.

    Args:
        value: (d, e), or (groups, d, e).
        x: (rows, d), or (rows, groups, d).
        y: (rows, e), or (rows, groups, e).
        beta: Weight of what is there; with 0 it does not matter at all.
        alpha: Weight of the product.
    """
    if len(x) > 8 * _PART and min(x.shape[-1], y.shape[-1]) < _NARROW:
        blend(value, _in_parts(x, y), beta, alpha)
    elif value.dim() == 2:
        value.addmm_(x.T, y, beta=beta, alpha=alpha)
    else:
        value.baddbmm_(x.permute(1, 2, 0), y.permute(1, 0, 2), beta=beta, alpha=alpha)


def _in_parts(x: Tensor, y: Tensor) -> Tensor:
    """X^T Y as a sum over parts of the rows.

    Products that narrow are summed one row after the other by some libraries. Of 200,000 equal pixels, as a background
    has, each addition then errs to the same side: in float32 by 1e-3 of the sum, and A comes out asymmetric.
    """
    whole = len(x) // _PART * _PART
    left, right = (rows[:whole].view(-1, _PART, *rows.shape[1:]) for rows in (x, y))
    if x.dim() == 2:
        products = torch.sum(left.mT @ right, 0)
        return products.addmm_(x[whole:].T, y[whole:])
    products = torch.sum(left.permute(0, 2, 3, 1) @ right.permute(0, 2, 1, 3), 0)
    return products.baddbmm_(x[whole:].permute(1, 2, 0), y[whole:].permute(1, 0, 2))


def add_squares(value: Tensor, x: Tensor, beta: float, alpha: float) -> None:
    """value <- beta value + alpha (sum over rows of the squares), for x of (rows, *value.shape)."""
    blend(value, x.square().sum(0), beta, alpha)


def frequencies(
    tokens: Tensor,  # (rows,), negative where a row does not count
    size: int,
    like: Tensor,
) -> Tensor:
    """How often each token occurs, (size,)."""
    found = like.new_zeros(size + 1)
    return found.index_add_(0, tokens.clamp_min(-1) + 1, torch.ones_like(tokens, dtype=like.dtype))[1:]


def side_shape(block: Block, side: Side, d: int) -> tuple[int, ...]:
    """Shape of one factor of a block."""
    whole = (d, d) if side is Side.FULL else (d,)
    return whole if block.groups == 1 else (block.groups, *whole)


class InputFactor(Moment):
    """A_i = E[abar_i abar_i^T] over rows, or its diagonal."""

    symmetric = True

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """(d_in, d_in) a block, with the groups in front if there are several; (d_in,) for a diagonal side."""
        return [side_shape(block, block.input_side, block.d_in) for block in layers]

    def tallies(self, samples: Samples) -> list[Tally]:
        """Rows."""
        return [Tally(0, 0) if s is None else Tally(s.rows, s.rows) for s in samples]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """One product a block."""
        for block, value, s, b, a in zip(self.layers, values, samples, beta, alpha, strict=True):
            if s is None:
                continue
            if block.input_side is Side.DIAGONAL:
                if s.inputs.is_floating_point():
                    add_squares(value, s.inputs, b, a)
                else:
                    blend(value, frequencies(s.inputs, block.d_in, value), b, a)
            else:
                x = s.inputs if s.inputs.is_floating_point() else one_hot_rows(s.inputs, block.d_in, value)
                add_products(value, x, x, b, a)


class OutputFactor(Moment):
    """G_i = E[g_i g_i^T], summed over passes and rows and divided by S, or its diagonal."""

    symmetric = True

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """(d_out, d_out) a block, with the groups in front if there are several; (d_out,) for a diagonal side."""
        return [side_shape(block, block.output_side, block.d_out) for block in layers]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """One product a block."""
        for block, value, s, b, a in zip(self.layers, values, samples, beta, alpha, strict=True):
            if s is None:
                continue
            g = s.gradients.flatten(0, 1)
            if block.output_side is Side.DIAGONAL:
                add_squares(value, g, b, a)
            else:
                add_products(value, g, g, b, a)


class _Cross(Moment):
    """Products of the rows of two blocks that share their positions."""

    @classmethod
    def serves(cls, block: Block) -> bool:
        """One Kronecker product of two whole factors."""
        return block.plain

    def seen(self, samples: Samples) -> list[tuple[LayerSamples, LayerSamples] | None]:
        """Both blocks' samples of each pair; None where one saw nothing.

        Raises:
            UnsupportedModelError: The two have different rows; names them.
        """
        found: list[tuple[LayerSamples, LayerSamples] | None] = []
        for i, j in self.pairs:
            a, b = samples[i], samples[j]
            if a is None or b is None:
                found.append(None)
                continue
            if a.gradients.shape[:2] != b.gradients.shape[:2] or len(a.inputs) != len(b.inputs):
                raise UnsupportedModelError(
                    f"the blocks {self.layers[i].name} and {self.layers[j].name} cannot be coupled: the first has "
                    f"{len(a.inputs)} rows, the second {len(b.inputs)}. Leave the pair out, or use approx = 'blockdiag'"
                )
            found.append((a, b))
        return found

    def tallies(self, samples: Samples) -> list[Tally]:
        """S where both saw something."""
        total = divisor_of(samples)
        return [Tally(total, 0 if pair is None else pair[0].rows) for pair in self.seen(samples)]


class InputCross(_Cross):
    """Ax = E[abar_i abar_j^T] over rows, (d_in of i, d_in of j), a pair (i, j)."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a pair."""
        return [(layers[i].d_in, layers[j].d_in) for i, j in self.pairs]

    def tallies(self, samples: Samples) -> list[Tally]:
        """Rows where both saw something."""
        return [Tally(0, 0) if pair is None else Tally(pair[0].rows, pair[0].rows) for pair in self.seen(samples)]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """abar of one block with abar of the other."""
        for value, pair, b, a in zip(values, self.seen(samples), beta, alpha, strict=True):
            if pair is not None:
                add_products(value, pair[0].inputs, pair[1].inputs, b, a)


class OutputCross(_Cross):
    """Gx = E[g_i g_j^T], summed over passes and rows and divided by S, (d_out of i, d_out of j), a pair (i, j)."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a pair."""
        return [(layers[i].d_out, layers[j].d_out) for i, j in self.pairs]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """g of one block with g of the other."""
        for value, pair, b, a in zip(values, self.seen(samples), beta, alpha, strict=True):
            if pair is not None:
                add_products(value, pair[0].gradients.flatten(0, 1), pair[1].gradients.flatten(0, 1), b, a)


def one_hot_rows(
    tokens: Tensor,  # (rows,), negative where a row does not count
    size: int,
    like: Tensor,
) -> Tensor:
    """The rows that token numbers stand for, (rows, size)."""
    rows: Tensor = one_hot(tokens.clamp_min(-1) + 1, size + 1)
    return rows[:, 1:].to(like.dtype)
