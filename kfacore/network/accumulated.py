r"""A mini-batch that comes in micro-batches: what is asked of it is the sum over them, with one graph at a time.

    J^T v = sum over micro-batches of J_i^T v_i,        J v = (J_1 v, J_2 v, ...).

Only outputs are kept of all micro-batches. Each is run forward again for statistics and for the gradient; J v and h run
it again anyway. What a model draws is drawn again as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kfacore.network.linearization import Linearization
from kfacore.network.linearizer import Linearizer
from kfacore.network.vectors import BlockVector
from kfacore.roles.samples import LayerSamples

__all__ = ["Accumulated", "MicroBatches"]


class MicroBatches(list[Any]):
    """The inputs of each micro-batch.

    Attributes:
        sizes: Cases of each.

    Args:
        inputs: The inputs.
        sizes: Cases of each.
    """

    def __init__(self, inputs: Sequence[Any], sizes: Sequence[int]) -> None:
        super().__init__(inputs)
        self.sizes = list(sizes)


class Accumulated:
    """Micro-batches, linearised at the current parameters; the methods are those of `Linearization`.

    Args:
        linearizer: Linearises each.
        inputs: Theirs.
        statistics_cases: How many of the first cases of all the estimator will use.
        low: Autocast dtype of forward and backward passes.
        pulled_cases: How many of the first cases `pull_back` will be asked for.
        look: Whether the model is looked at because another process has to.

    Attributes:
        layers: The blocks, in execution order.
        cases: Number of cases of all.
        plain: Whether the fast path serves all of it.
        bare: Whether the model returned one number a case, without an axis of outputs.
    """

    def __init__(
        self,
        linearizer: Linearizer,
        inputs: MicroBatches,
        statistics_cases: int,
        low: torch.dtype | None = None,
        pulled_cases: int = 0,
        *,
        look: bool = False,
    ) -> None:
        self._parts: list[Linearization] = []
        self._starts = [0, *accumulate(inputs.sizes)]
        for part, start, size in zip(inputs, self._starts, inputs.sizes, strict=False):
            kept, pulled = (min(max(n - start, 0), size) for n in (statistics_cases, pulled_cases))
            batch = linearizer(part, kept, low, pulled, look=look and not self._parts)
            batch.release()
            self._parts.append(batch)
        self._linearizer, self._kept = linearizer, statistics_cases
        self.layers = linearizer.layers
        self.cases = sum(part.cases for part in self._parts)
        self.bare = self._parts[0].bare
        self.plain = all(part.plain for part in self._parts)
        self._work: BlockVector | None = None

    @property
    def cut(self) -> bool:
        """Whether it may be cut by cases."""
        return self._linearizer.cut

    def model_cases(self, cases: int) -> int:
        """How many cases J v is really of when it is asked for so many: all where a mini-batch is not cut."""
        return cases if self._linearizer.cut else self.cases

    def outputs(self) -> list[Tensor]:
        """z of each chunk of each micro-batch, detached, in the order of the cases."""
        return [z for part in self._parts for z in part.outputs()]

    def statistics_outputs(self) -> Tensor:
        """z of the estimator's cases, (n, ..., o), detached."""
        return torch.cat([part.statistics_outputs() for part in self._parts])

    def signs(self, z: Tensor, generator: torch.Generator, part: tuple[Tensor, int] | None = None) -> Tensor:
        """A random sign for every case and position; see `Linearization.signs`."""
        return self._parts[0].signs(z, generator, part)

    def seen(
        self, vectors: Tensor, *, valid: Tensor | None = None, total: float | Tensor | None = None
    ) -> Iterator[tuple[float, Sequence[LayerSamples | None]]]:
        """What the blocks saw in each micro-batch, with its share of the estimator's cases, which is that of S too."""
        n, start = vectors.shape[1], 0
        total = total.double() if isinstance(total, Tensor) else total
        for part in self._parts:
            size = len(part.statistics_outputs())
            if not size:
                continue
            here, share = slice(start, start + size), size / n
            with part.renewed():
                samples = part.backpropagate(
                    vectors[:, here],
                    valid=None if valid is None else valid[here],
                    total=None if total is None else total * share,
                )
            yield share, samples
            start += size

    def gradient(self, vectors: Sequence[Tensor], out: BlockVector, *, retain: bool = False) -> BlockVector:
        """J^T v summed over all cases, written into ``out``; ``retain`` is for graphs that are kept."""
        start = 0
        for index, part in enumerate(self._parts):
            count = len(part.outputs())
            into = self._buffer(out, index)
            with part.renewed():
                part.gradient(vectors[start : start + count], into)
            self._add(into, out, index)
            start += count
        return out

    def pull_back(
        self,
        v: Tensor,  # (n, ..., o)
        out: BlockVector,
    ) -> BlockVector:
        """J^T v summed over the first n cases, written into ``out``."""
        for index, (part, here) in enumerate(self._first(len(v))):
            into = self._buffer(out, index)
            with part.renewed():
                part.pull_back(v[here], into)
            self._add(into, out, index)
        return out

    def jvp(
        self,
        directions: Sequence[Sequence[Tensor]],  # k times one matrix a block
        cases: int | None = None,
    ) -> Tensor:  # (k, n, ..., o)
        """J v for several directions, on the first cases: on `model_cases` of them."""
        found = []
        for part, here in self._first(self.model_cases(self.cases if cases is None else cases)):
            # Known products are made of what the blocks saw; the other ways run the model by themselves.
            with part.renewed() if part.plain else nullcontext():
                found.append(part.jvp(directions, here.stop - here.start))
        return torch.cat(found, 1)

    def again(self) -> Tensor:  # (n, ..., o)
        """z of all cases at the model's current parameters."""
        return torch.cat([part.again() for part in self._parts])

    def _first(self, n: int) -> Iterator[tuple[Linearization, slice]]:
        """The micro-batches of the first n cases, with those of their cases that belong to these."""
        for part, start in zip(self._parts, self._starts, strict=False):
            if start < n:
                yield part, slice(start, min(start + part.cases, n))

    def _buffer(self, out: BlockVector, index: int) -> BlockVector:
        """Where a micro-batch's share goes: the first one's straight into the result."""
        if index == 0:
            return out
        self._work = self._work or BlockVector.zeros(self._linearizer.layers)
        return self._work

    @staticmethod
    def _add(share: BlockVector, out: BlockVector, index: int) -> None:
        if index:
            out.flat.add_(share.flat)
