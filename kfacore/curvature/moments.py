r"""Running averages of second moments: the statistics that approximations are made of.

A moment sees each mini-batch's layer inputs and output gradients and averages (method, section 2, step 3)

    X <- f X + (1 - f) X_new,     f = min(1 - 1/k, decay),

so that the first estimate is taken whole and the scale never depends on the batch size. Moments are uncentred.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from kfacore.roles.block import Block
from kfacore.roles.moment import Moment
from kfacore.roles.samples import LayerSamples

__all__ = ["InputCross", "InputFactor", "OutputCross", "OutputFactor"]


class _Products(Moment):
    """Averages of products X^T Y over cases."""

    @abstractmethod
    def rows(self, samples: Sequence[LayerSamples]) -> Iterator[tuple[Tensor, Tensor]]:
        """The two matrices of rows whose product is averaged, one pair a value."""

    def update(self, samples: Sequence[LayerSamples], keep: float) -> None:
        """One product a value, straight into the average."""
        scale = (1.0 - keep) / samples[0].cases
        for value, (x, y) in zip(self.values, self.rows(samples), strict=True):
            value.addmm_(x.T, y, beta=keep, alpha=scale)


class InputFactor(_Products):
    """A_i = E[abar_{i-1} abar_{i-1}^T], (d_in, d_in)."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """(d_in, d_in) a layer."""
        return [(layer.d_in, layer.d_in) for layer in layers]

    def rows(self, samples: Sequence[LayerSamples]) -> Iterator[tuple[Tensor, Tensor]]:
        """abar with itself."""
        return ((s.inputs, s.inputs) for s in samples)


class OutputFactor(_Products):
    """G_i = E[g_i g_i^T], (d_out, d_out)."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """(d_out, d_out) a layer."""
        return [(layer.d_out, layer.d_out) for layer in layers]

    def rows(self, samples: Sequence[LayerSamples]) -> Iterator[tuple[Tensor, Tensor]]:
        """g with itself, over cases and passes."""
        return ((g, g) for g in _gradients(samples))


class InputCross(_Products):
    """Ax_i = E[abar_{i-1} abar_i^T], (d_in of i, d_in of i+1), for i < L."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a pair of adjacent layers."""
        return [(a.d_in, b.d_in) for a, b in pairwise(layers)]

    def rows(self, samples: Sequence[LayerSamples]) -> Iterator[tuple[Tensor, Tensor]]:
        """abar of a layer with abar of the next."""
        return ((a.inputs, b.inputs) for a, b in pairwise(samples))


class OutputCross(_Products):
    """Gx_i = E[g_i g_{i+1}^T], (d_out of i, d_out of i+1), for i < L."""

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One a pair of adjacent layers."""
        return [(a.d_out, b.d_out) for a, b in pairwise(layers)]

    def rows(self, samples: Sequence[LayerSamples]) -> Iterator[tuple[Tensor, Tensor]]:
        """g of a layer with g of the next, over cases and passes."""
        gradients = _gradients(samples)
        return pairwise(gradients)


def _gradients(samples: Sequence[LayerSamples]) -> list[Tensor]:
    """g as rows, (k n, d_out)."""
    return [s.gradients.flatten(0, 1) for s in samples]
