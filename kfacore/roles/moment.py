r"""Running averages of second moments: what an approximation declares and is made of.

A moment takes in what a mini-batch showed, in one part or several, and averages (method, section 2, step 3)

    X <- f X + (1 - f) X_new,     f = min(1 - 1/k, decay),     X_new = sum over rows / divisor,

so that the first estimate is taken whole and the scale never depends on the batch size. k is counted for each value: a
block that a mini-batch did not use keeps its average and its k. Moments are uncentred.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.samples import Samples

__all__ = ["Moment", "Moments", "Number", "Tally", "blend", "divisor_of"]


M = TypeVar("M", bound="Moment")

Number = int | float | Tensor
"""A number that the host knows, or a scalar on the device."""


class Tally(NamedTuple):
    """What a sum over rows is divided by.

    Attributes:
        divisor: Number of rows, or S.
        seen: Rows that the sum was made of; with none the average stays what it is.
    """

    divisor: Number
    seen: Number


def divisor_of(samples: Samples) -> Number:
    """S of a mini-batch, the same for all blocks; 0 where no block saw anything."""
    return next((s.divisor for s in samples if s is not None), 0)


class Moment(ABC):
    """One kind of running average: tensors for each block, for each pair of blocks, or for all of them together.

    A subclass says what shapes its values have (`shapes`), how rows are summed (`accumulate`), and, where that is not
    S for all, what the sums are divided by (`tallies`). When averages are taken, over how many parts of a mini-batch
    and over how many processes, is not its affair.

    Attributes:
        values: The averages, in the blocks' order, updated in place. A moment with several tensors a block lists the
            first of every block, then the second of every block, and so on.
        updates: k of each value, the mini-batches that it is an average of.
        pairs: Indices (i, j) of the blocks that are coupled.

    Args:
        layers: The blocks, in execution order.
        like: A tensor with the dtype and device of the averages.
        pairs: Pairs of blocks for moments that need them; each block and the next if left out.
    """

    def __init__(self, layers: Sequence[Block], like: Tensor, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        self.layers = layers
        self.pairs = list(pairwise(range(len(layers)))) if pairs is None else list(pairs)
        self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in self.shapes(layers)]
        self.updates: list[Number] = [0] * len(self.values)
        self._sums: list[Tensor] | None = None
        self._tallies: list[Tally] = []

    _place: torch.device | None = None
    """Where sums are made; None is where the averages are."""

    symmetric: ClassVar[bool] = False
    """Whether values with two equal last dimensions are symmetric matrices, which travel between processes as half."""

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Whether samples of this kind of block can be summed; by default of any Kronecker product."""
        return block.kind == "kron"

    @abstractmethod
    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """Shape of each value."""

    @abstractmethod
    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """Sum over rows, in place: value <- beta value + alpha (sum over the samples' rows), for each value.

        With a beta of 0 the old value must not matter at all, be it NaN (as in `torch.addmm`). A value whose samples
        are None is left alone.

        Args:
            values: Tensors like `values`, not always themselves.
            samples: What a mini-batch, or a part of one, showed of each block.
            beta: One number a value.
            alpha: One number a value.
        """

    def tallies(self, samples: Samples) -> list[Tally]:
        """What each value's sum is divided by; S by default, for one or several values a block, block by block."""
        total, count = divisor_of(samples), max(1, len(samples))
        seen = [0 if s is None else s.rows for s in samples]
        return [Tally(total, seen[i % count]) for i in range(len(self.values))]

    def add(self, samples: Samples) -> None:
        """Take in a part of a mini-batch; several until `commit`."""
        tallies = self.tallies(samples)
        if self._sums is None:
            self._sums = [torch.zeros_like(value, device=self._place) for value in self.values]
            self._tallies = [Tally(0, 0)] * len(self.values)
        self._tallies = [Tally(a + c, b + d) for (a, b), (c, d) in zip(self._tallies, tallies, strict=True)]
        ones = [1.0] * len(self.values)
        self.accumulate(self._sums, samples, ones, ones)

    @property
    def summed(self) -> bool:
        """Whether something was added since the last `commit`."""
        return self._sums is not None

    def commit(self, decay: float) -> None:
        """Average in what `add` took in since the last time."""
        if self._sums is None:
            return
        for i, (value, new, tally) in enumerate(zip(self.values, self._sums, self._tallies, strict=True)):
            known = not any(isinstance(x, Tensor) for x in (*tally, self.updates[i]))
            if known and not tally.seen:
                continue
            if known:
                keep = self._keep(i, decay)
                blend(value, new, keep, (1.0 - keep) / float(tally.divisor))
            else:
                self._blend_on_device(i, value, new, tally, decay)
        self._sums = None

    def average(self, samples: Samples, decay: float, tallies: Sequence[Tally] | None = None) -> None:
        """`add` and `commit` of a mini-batch in one part: sums straight into the averages, where the host can count.

        Args:
            samples: What was seen.
            decay: Largest weight of the past.
            tallies: Of the mini-batch that this is one process's part of: the averages are then its share of those of
                the whole, which are sums over processes.
        """
        if tallies is not None:
            self._average_share(samples, decay, tallies)
            return
        tallies = self.tallies(samples)
        if any(isinstance(x, Tensor) for tally in tallies for x in tally) or any(
            isinstance(k, Tensor) for k in self.updates
        ):
            self.add(samples)
            self.commit(decay)
            return
        beta, alpha = [1.0] * len(tallies), [0.0] * len(tallies)
        for i, tally in enumerate(tallies):
            if tally.seen:
                beta[i] = self._keep(i, decay)
                alpha[i] = (1.0 - beta[i]) / float(tally.divisor)
        self.accumulate(self.values, samples, beta, alpha)

    def _average_share(self, samples: Samples, decay: float, tallies: Sequence[Tally]) -> None:
        """The weights are those of the whole mini-batch, also where this part of it showed nothing."""
        here = [bool(float(tally.seen)) for tally in self.tallies(samples)]
        beta, alpha = [1.0] * len(tallies), [0.0] * len(tallies)
        for i, tally in enumerate(tallies):
            if float(tally.seen):
                beta[i] = self._keep(i, decay)
                alpha[i] = (1.0 - beta[i]) / float(tally.divisor)
        for value, b, some in zip(self.values, beta, here, strict=True):
            if not some and b != 1.0:  # what is not accumulated must decay all the same
                value.mul_(b) if b else value.zero_()
        kept = [b if some else 1.0 for b, some in zip(beta, here, strict=True)]
        self.accumulate(self.values, samples, kept, alpha)

    def _keep(self, i: int, decay: float) -> float:
        """f of one value, whose k goes up."""
        self.updates[i] += 1
        return min(1.0 - 1.0 / float(self.updates[i]), decay)

    def _blend_on_device(self, i: int, value: Tensor, new: Tensor, tally: Tally, decay: float) -> None:
        """The same where only the device knows how many rows there were: nothing waits for it."""
        some = _scalar(tally.seen, value) > 0
        k = _scalar(self.updates[i], value) + some
        keep = torch.where(some, (1.0 - 1.0 / k.clamp_min(1.0)).clamp_max(decay), 1.0)
        divisor = _scalar(tally.divisor, value)
        share = torch.where(some, (1.0 - keep) / torch.where(some, divisor, 1.0), 0.0)
        old = torch.where(keep > 0, value, torch.zeros_like(value))  # what was NaN must not show through
        value.copy_(old * keep.to(value.dtype) + new * share.to(value.dtype))
        self.updates[i] = k

    def forget(self) -> None:
        """Drop what was added since the last `commit`."""
        self._sums, self._tallies = None, []

    def pending(self, samples: Samples) -> list[Tensor]:
        """Sums and tallies since the last `commit`, to be summed over processes; zeros where nothing was added."""
        if self._sums is None:
            self.add([None for _ in samples])
        assert self._sums is not None
        if not self._sums:
            return []
        device = self._sums[0].device
        numbers = [torch.as_tensor(x, dtype=torch.float64, device=device) for tally in self._tallies for x in tally]
        return [*self._sums, torch.stack(numbers).reshape(-1, 2)]

    def load_pending(self, tensors: Sequence[Tensor]) -> None:
        """Take what `pending` gave, summed over processes, in place of the own."""
        if tensors:
            *self._sums, tallies = tensors
            self._tallies = [Tally(*row.unbind()) for row in tallies]

    def averaged(self) -> list[bool]:
        """Which of `values` are averages, which processes add up; others (coordinates, say) all have alike."""
        return [True] * len(self.values)

    def is_symmetric(self, value: Tensor) -> bool:
        """Whether one of `values` is a symmetric matrix, or several."""
        return self.symmetric and value.dim() >= 2 and value.shape[-1] == value.shape[-2]

    def frozen(self: M) -> M:
        """A copy that later updates do not change."""
        twin = copy(self)
        twin.values, twin.updates = [value.clone() for value in self.values], list(self.updates)
        twin._sums, twin._tallies = None, []
        return twin

    def restart(self) -> bool:
        """Forget averages that are not finite, which no decay mends: the next mini-batch's estimate is taken whole.

        Returns:
            Whether there were any; waits for the device.
        """
        here = [i for i, value in enumerate(self.values) if not value.is_meta]  # others are another process's
        bad = [i for i in here if not bool(self.values[i].isfinite().all())]
        found = any(float(self.updates[i]) for i in bad)
        for i in bad:
            self.updates[i] = 0
        return found

    def refreshed(self, inverse: Inverse) -> None:  # noqa: B027  # optional: most moments have no coordinates
        """Called when an inverse has been taken up, for averages kept in its coordinates; nothing by default."""


def blend(value: Tensor, new: Tensor, beta: float, alpha: float) -> None:
    """value <- beta value + alpha new; with beta = 0 whatever the old value is."""
    if beta == 0.0:
        torch.mul(new.to(value.dtype), alpha, out=value)
    else:
        value.mul_(beta).add_(new, alpha=alpha)


def _scalar(number: Number, like: Tensor) -> Tensor:  # () float64
    """A number on the device: filled there, since a copy of a host number would have to be waited for."""
    if isinstance(number, Tensor):
        return number.to(like.device, torch.float64)
    return torch.full((), number, dtype=torch.float64, device=like.device)


class Moments:
    """The moments that an approximation declared, updated together.

    Attributes:
        layers: The blocks, in execution order.
        pairs: Indices (i, j) of the blocks that are coupled.
        updates: Number of mini-batches seen; each value has its own k, see `Moment.updates`.

    Args:
        kinds: The moment classes.
        layers: The blocks.
        like: A tensor with the dtype and device of the averages.
        pairs: Which blocks moments of pairs couple; each block and the next if left out.
    """

    def __init__(
        self,
        kinds: Sequence[type[Moment]],
        layers: Sequence[Block],
        like: Tensor,
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.layers = layers
        self.pairs = list(pairwise(range(len(layers)))) if pairs is None else list(pairs)
        self.updates = 0
        self._by_kind = {kind: kind(layers, like, self.pairs) for kind in kinds}
        self._waiting: Samples | None = None

    @property
    def kinds(self) -> tuple[type[Moment], ...]:
        """The moment classes."""
        return tuple(self._by_kind)

    @property
    def pending_count(self) -> int:
        """Number of tensors that `pending` gives."""
        return sum(len(moment.values) + bool(moment.values) for moment in self._by_kind.values())

    def __getitem__(self, kind: type[M]) -> list[Tensor]:
        """The averages of one kind; read-only for everyone but the moment itself."""
        return self._by_kind[kind].values

    def snapshot(self, kind: type[M]) -> list[Tensor]:
        """Copies of the averages of one kind, which later updates do not change."""
        return [value.clone() for value in self[kind]]

    def frozen(self) -> Moments:
        """A copy that later updates do not change, for work that goes on beside them."""
        twin = copy(self)
        twin._by_kind = {kind: moment.frozen() for kind, moment in self._by_kind.items()}
        twin._waiting = None
        return twin

    def restart(self) -> bool:
        """Forget averages that are not finite, see `Moment.restart`."""
        found = [moment.restart() for moment in self._by_kind.values()]
        return any(found)

    def sum_on(self, device: torch.device) -> None:
        """Make sums on this device, where averages have shapes alone (on ``meta``): another process has them."""
        for moment in self._by_kind.values():
            moment._place = device

    def update(self, samples: Samples, decay: float) -> None:
        """Take in a mini-batch with f = min(1 - 1/k, decay)."""
        self.add(samples)
        self.commit(decay)

    def tallies(self, samples: Samples) -> list[Tally]:
        """What each sum of `samples` is divided by, kind by kind."""
        return [tally for moment in self._by_kind.values() for tally in moment.tallies(samples)]

    def update_share(self, samples: Samples, decay: float, tallies: Sequence[Tally]) -> None:
        """Take in one process's part of a mini-batch, for averages that are sums over processes.

        Args:
            samples: What was seen here.
            decay: Largest weight of the past.
            tallies: As `tallies` gives them, summed over processes.
        """
        self.updates += 1
        start = 0
        for moment in self._by_kind.values():
            count = len(moment.values)
            moment.average(samples, decay, tallies[start : start + count])
            start += count

    @property
    def averages(self) -> list[tuple[Tensor, bool]]:
        """Every average, and whether it is a symmetric matrix, in a fixed order."""
        return [
            (value, moment.is_symmetric(value))
            for moment in self._by_kind.values()
            for value, one in zip(moment.values, moment.averaged(), strict=True)
            if one
        ]

    @property
    def turns(self) -> bool:
        """Whether some averages are kept in coordinates of the inverse in use."""
        return any(type(moment).refreshed is not Moment.refreshed for moment in self._by_kind.values())

    @property
    def pending_symmetric(self) -> list[bool]:
        """Which of the tensors of `pending` are symmetric matrices."""
        return [
            symmetric
            for moment in self._by_kind.values()
            for symmetric in (*map(moment.is_symmetric, moment.values), *([False] if moment.values else []))
        ]

    def add(self, samples: Samples) -> None:
        """Take in a part of a mini-batch: a micro-batch, say. Averages do not move before `commit`.

        A single part is kept as it is until then, so that its sums go straight into the averages.
        """
        if self._waiting is None:
            self._waiting = samples
            return
        self._flush()
        self._waiting = samples

    def commit(self, decay: float) -> None:
        """Average in what was added since the last time, with f = min(1 - 1/k, decay); nothing if nothing was."""
        summed = any(moment.summed for moment in self._by_kind.values())
        if self._waiting is None and not summed:
            return
        self.updates += 1
        for moment in self._by_kind.values():
            if self._waiting is not None and not summed:
                moment.average(self._waiting, decay)
                continue
            if self._waiting is not None:
                moment.add(self._waiting)
            moment.commit(decay)
        self._waiting = None

    def forget(self) -> None:
        """Drop what was added since the last `commit`: the step that it was for did not come to its end."""
        for moment in self._by_kind.values():
            moment.forget()
        self._waiting = None

    def pending(self) -> list[Tensor]:
        """Sums and counts of what was added, in a fixed order and in fixed shapes: what processes add up."""
        self._flush()
        nothing: Samples = [None for _ in self.layers]
        return [tensor for moment in self._by_kind.values() for tensor in moment.pending(nothing)]

    def load_pending(self, tensors: Sequence[Tensor]) -> None:
        """Take up what `pending` of all processes summed to; `commit` then averages it in."""
        start = 0
        for moment in self._by_kind.values():
            count = len(moment.values) + bool(moment.values)
            moment.load_pending(tensors[start : start + count])
            start += count
        self._waiting = None

    def _flush(self) -> None:
        """Sum what waits."""
        if self._waiting is not None:
            for moment in self._by_kind.values():
                moment.add(self._waiting)
            self._waiting = None

    def refreshed(self, inverse: Inverse) -> None:
        """Tell the moments which inverse is in use now."""
        for moment in self._by_kind.values():
            moment.refreshed(inverse)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, that of each value, and a copy of every average."""
        values = {kind.__name__: self.snapshot(kind) for kind in self._by_kind}
        counts = {kind.__name__: [_number(k) for k in moment.updates] for kind, moment in self._by_kind.items()}
        return {"updates": self.updates, "counts": counts, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up averages of the same kinds and shapes.

        Raises:
            ConfigError: The state is of an approximation with other moments, of blocks of other shapes, or of an
                earlier version.
        """
        self._check(state)
        self.updates = state["updates"]
        for kind, moment in self._by_kind.items():
            # New tensors, so that an inverse which shares one (an eigenbasis, say) is not written to.
            pairs = zip(moment.values, state["values"][kind.__name__], strict=True)
            moment.values = [torch.empty_like(value).copy_(saved) for value, saved in pairs]
            moment.updates = list(state["counts"][kind.__name__])

    def _check(self, state: dict[str, Any]) -> None:
        """Kinds, counts and shapes."""
        names, saved = {kind.__name__ for kind in self._by_kind}, state.get("values", {})
        if set(saved) != names:
            raise ConfigError(
                f"the saved statistics are {', '.join(sorted(saved)) or 'those of several kinds of blocks'}; "
                f"this approximation needs {', '.join(sorted(names))}"
            )
        if "counts" not in state:
            raise ConfigError("the saved statistics are of an earlier version, which kept no counts: start anew")
        for kind, moment in self._by_kind.items():
            here = [tuple(value.shape) for value in moment.values]
            there = [tuple(value.shape) for value in saved[kind.__name__]]
            if here != there:
                raise ConfigError(
                    f"the saved statistics {kind.__name__} have the shapes {there}, this model's have {here}: was it "
                    "made with other options (approx.max_dim), or with other pairs?"
                )


def _number(k: Number) -> Number:
    return k.clone() if isinstance(k, Tensor) else k
