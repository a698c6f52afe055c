"""Several processes as an optimizer sees them: sums, comparisons, and failures that all of them learn of.

`Ranks` is one process alone: every sum is its own, nothing is sent. `Processes` are those of torch.distributed. Who
uses either has no branch for it.

Before anything is summed the processes exchange a few numbers on the host (`Processes.exchange`): where each of them
is, and whether something went wrong there. So an error on one of them is raised on all, in the same place, and those
that are at different places find out instead of waiting for each other.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kfacore import errors
from kfacore.errors import ConfigError, DataError, KfacError, RankError
from kfacore.parallel.whole import Whole

__all__ = ["ALONE", "Processes", "Ranks", "checksum", "current_ranks", "find_ranks"]

_local = threading.local()

_KNOWN = "_kfac_known_to_all"
"""Attribute of an error that the other processes know of, or cannot be told of."""

_HEAD = 4
"""Numbers of an exchange before those of single processes: failed, tag, minus tag, flag."""


class Ranks:
    """One process alone.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        sent: Bytes that this process handed over to be summed or sent, by what they were.
        waiting: Seconds after which a process that does not answer counts as dead; None is torch's own limit.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.size == 1

    def telling(self, what: str) -> AbstractContextManager[None]:
        """Run what may fail in here: if it does, the others are told of it the next time that they exchange anything.

        Args:
            what: As in `together`.
        """
        return nullcontext()

    def together(self, what: str) -> AbstractContextManager[None]:
        """Run what may fail in here: if it fails on one process an error is raised on all.

        Args:
            what: What is done, for messages; the same words on all processes.

        Raises:
            KfacError: Another process failed; the message says which one, and how.
        """
        return nullcontext()

    def whole(self, what: str, cases: Callable[[], int], flag: bool = False) -> tuple[Whole, bool]:
        """The mini-batch that all share, and whether a flag is set anywhere.

        Args:
            what: As in `together`.
            cases: Says how many cases are here; may fail.
            flag: One's own flag.
        """
        return Whole((cases(),)), flag

    def any(self, what: str, flag: bool) -> bool:
        """Whether a flag is set anywhere."""
        return flag

    def most(self, what: str, number: int) -> int:
        """The largest of their numbers, which are at least 0."""
        return number

    def least(self, what: str, number: int) -> int:
        """The smallest of their numbers, which are at least 0."""
        return number

    def alike(self, what: str, number: int) -> bool:
        """Whether all have the same number, at least 0."""
        return True

    def count(self, what: str, numbers: Sequence[float]) -> list[float]:
        """Sums of numbers of the host; no device is waited for."""
        return list(numbers)

    def sum(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over processes, the same bits on all of them; tensors of the same shapes everywhere."""
        return list(tensors)

    def sum_into(self, what: str, tensor: Tensor) -> None:
        """The same in place."""

    def sum_to(self, what: str, tensors: Sequence[Tensor], owner: int) -> list[Tensor] | None:
        """Sums over processes, for one of them; None for the others."""
        return list(tensors)

    def swap(self, what: str, tensor: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """Hand each process its part of a vector, and take one from each.

        Args:
            what: What it is, for messages and the count of bytes.
            tensor: The parts for all processes, one after the other.
            given: Their sizes.
            taken: Sizes of what comes from each process.
        """
        return tensor.clone()

    def gather(self, what: str, value: Any) -> list[Any]:
        """What each process has, small and of plain Python, in their order."""
        return [value]

    def broadcast(self, what: str, tensor: Tensor, source: int) -> None:
        """Take up what one of them has, in place."""

    def require_same(self, what: str, values: Mapping[str, Any], remedy: str) -> None:
        """Refuse values that are not the same on all processes.

        Raises:
            ConfigError: They differ; the message names the first that does, and the remedy.
        """

    def dividing(self) -> AbstractContextManager[None]:
        """Let the processes divide among themselves what is shared out in here (`kfacore.parallel.cores.share`)."""
        return nullcontext()

    def beside(self) -> Ranks:
        """The same processes for work on another thread, whose messages must not mix with this one's."""
        return self


ALONE = Ranks()
"""One process alone."""


class Processes(Ranks):
    """The processes of a group of torch.distributed.

    Args:
        group: The group; None is the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._members = dist.get_process_group_ranks(group) if group is not None else list(range(self.size))
        gloo = dist.get_backend(group) == "gloo"
        # Numbers of the host go from host to host: a device is not waited for.
        self._hosts = group if gloo else dist.new_group(self._members, backend="gloo")

    def exchange(
        self, what: str, flag: int = 0, own: int = 0, failure: BaseException | None = None
    ) -> tuple[int, list[int]]:
        """Tell each other where one is and how it went.

        Args:
            what: Where one is.
            flag: Any number of at least 0.
            own: Likewise.
            failure: What went wrong here.

        Returns:
            The largest flag, and the own number of each process.

        Raises:
            KfacError: Something went wrong elsewhere, or the processes are at different places.
        """
        tag = zlib.crc32(what.encode())
        head = torch.zeros(_HEAD + self.size, dtype=torch.int64)
        head[:_HEAD] = torch.tensor([int(failure is not None), tag, -tag, flag])
        head[_HEAD + self.rank] = own
        with self._answered(what):
            dist.all_reduce(head, dist.ReduceOp.MAX, group=self._hosts)
        self.sent["exchanges"] += head.numel() * head.element_size()
        failed, highest, lowest, flag, *numbers = head.tolist()
        if failed or highest != -lowest:
            self._explain(what, failure)
        return flag, numbers

    def _explain(self, what: str, failure: BaseException | None) -> None:
        """All know that something is wrong: say what.

        Raises:
            KfacError: In any case but that of one's own failure, which the caller raises.
        """
        told = None if failure is None else (type(failure).__name__, str(failure))
        found: list[Any] = [None] * self.size
        with self._answered(what):
            dist.all_gather_object(found, (what, told), group=self._hosts)
        failed = [(rank, where, *other) for rank, (where, other) in enumerate(found) if other is not None]
        # Wrong data of one process makes numbers of all others not finite: it is the cause.
        cause = next((each for each in failed if each[2] == DataError.__name__), failed[0] if failed else None)
        if failure is not None and (isinstance(failure, DataError) or cause is None or cause[2] != DataError.__name__):
            return
        if cause is not None:
            rank, where, kind, message = cause
            known = getattr(errors, kind, None)
            if isinstance(known, type) and issubclass(known, KfacError):
                raise _told(known(f"rank {rank}: {message}"))
            first = (message.strip().splitlines() or [""])[0]
            raise _told(RankError(f"rank {rank} failed in its {where}: {kind}: {first}"))
        places = ", ".join(f"rank {rank} at '{where}'" for rank, (where, _) in enumerate(found))
        said = f"the processes are not at the same place: {places}. step, state_dict and load_state_dict must be called"
        raise _told(RankError(f"{said} by all of them, in the same order"))

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """See `Ranks.telling`."""
        try:
            yield
        except Exception as error:
            if not getattr(error, _KNOWN, False):
                self.exchange(what, failure=error)
            raise

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """See `Ranks.together`."""
        with self.telling(what):
            yield
        self.exchange(what)

    def whole(self, what: str, cases: Callable[[], int], flag: bool = False) -> tuple[Whole, bool]:
        """See `Ranks.whole`."""
        with self.telling(what):
            own = cases()
        found, sizes = self.exchange(what, int(flag), own)
        return Whole(tuple(sizes), self.rank), bool(found)

    def any(self, what: str, flag: bool) -> bool:
        """See `Ranks.any`."""
        return bool(self.exchange(what, int(flag))[0])

    def most(self, what: str, number: int) -> int:
        """See `Ranks.most`."""
        return self.exchange(what, number)[0]

    def least(self, what: str, number: int) -> int:
        """See `Ranks.least`."""
        return min(self.exchange(what, own=number)[1])

    def alike(self, what: str, number: int) -> bool:
        """See `Ranks.alike`."""
        return len(set(self.exchange(what, own=number)[1])) == 1

    def count(self, what: str, numbers: Sequence[float]) -> list[float]:
        """See `Ranks.count`."""
        flat = torch.tensor(numbers, dtype=torch.float64)
        if len(numbers):
            with self._answered(what):
                dist.all_reduce(flat, group=self._hosts)
        self.sent[what] += flat.numel() * flat.element_size()
        return [float(number) for number in flat.tolist()]

    def sum(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Ranks.sum`; one message a dtype."""
        return _flat_by_dtype(tensors, lambda flat: self.sum_into(what, flat))

    def sum_to(self, what: str, tensors: Sequence[Tensor], owner: int) -> list[Tensor] | None:
        """See `Ranks.sum_to`; one message a dtype."""

        def add(flat: Tensor) -> None:
            if flat.numel() == 0:
                return
            with self._answered(what):
                dist.reduce(flat, self._members[owner], group=self._group)
            self.sent[what] += flat.numel() * flat.element_size() if owner != self.rank else 0

        found = _flat_by_dtype(tensors, add)
        return found if owner == self.rank else None

    def sum_into(self, what: str, tensor: Tensor) -> None:
        """See `Ranks.sum_into`."""
        if tensor.numel() == 0:
            return
        with self._answered(what):
            dist.all_reduce(tensor, group=self._group)
        self.sent[what] += tensor.numel() * tensor.element_size()

    def swap(self, what: str, tensor: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """See `Ranks.swap`."""
        found = tensor.new_empty(sum(taken))
        with self._answered(what):
            dist.all_to_all_single(found, tensor, list(taken), list(given), group=self._group)
        self.sent[what] += (tensor.numel() - given[self.rank]) * tensor.element_size()
        return found

    def gather(self, what: str, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        self.exchange(what)
        found: list[Any] = [None] * self.size
        with self._answered(what):
            dist.all_gather_object(found, value, group=self._hosts)
        return found

    def broadcast(self, what: str, tensor: Tensor, source: int) -> None:
        """See `Ranks.broadcast`; counted where it comes from."""
        if tensor.numel() == 0:
            return
        with self._answered(what):
            dist.broadcast(tensor, self._members[source], group=self._group)
        self.sent[what] += tensor.numel() * tensor.element_size() if source == self.rank else 0

    def require_same(self, what: str, values: Mapping[str, Any], remedy: str) -> None:
        """See `Ranks.require_same`."""
        found = self.gather(what, {name: repr(value) for name, value in values.items()})
        for name in dict.fromkeys(name for each in found for name in each):
            each = [own.get(name, "nothing") for own in found]
            other = next((rank for rank, value in enumerate(each) if value != each[0]), None)
            if other is not None:
                raise ConfigError(f"{what}: {name} is {each[0]} on rank 0 and {each[other]} on rank {other}; {remedy}")

    @contextmanager
    def dividing(self) -> Iterator[None]:
        """See `Ranks.dividing`."""
        before = current_ranks()
        _local.ranks = self
        try:
            yield
        finally:
            _local.ranks = before

    def beside(self) -> Ranks:
        """See `Ranks.beside`: all processes must ask for it together."""
        twin = Processes(dist.new_group(self._members))
        twin.sent = self.sent
        return twin

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        """Say in one line that somebody is gone.

        Raises:
            RankError: In place of torch's error.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            said = (
                f"rank {self.rank} has no answer from the others in '{what}': one of them has died, hangs, or ran out "
                f"of memory (its own message says more; torch says: {first[:200]}). Start all of them again, from the "
                "last checkpoint"
            )
            raise _told(RankError(said)) from error


def _flat_by_dtype(tensors: Sequence[Tensor], change: Callable[[Tensor], None]) -> list[Tensor]:
    """The tensors after all of one dtype were changed as one vector."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in indices])
        change(flat)
        parts = torch.split(flat, [tensors[i].numel() for i in indices])
        found |= {i: part.view(tensors[i].shape) for i, part in zip(indices, parts, strict=True)}
    return [found[i] for i in range(len(tensors))]


def _told(error: KfacError) -> KfacError:
    """Mark an error as known to all."""
    setattr(error, _KNOWN, True)
    return error


def current_ranks() -> Ranks | None:
    """Who divides work on this thread, see `Ranks.dividing`; None for one process alone."""
    ranks: Ranks | None = getattr(_local, "ranks", None)
    return ranks


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that two lists of tensors share if they have the same bits, and hardly else. Waits for the device."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = bits[: len(bits) // 4 * 4].view(torch.int32)
        last = bits[len(whole) * 4 :]
        sums.append(whole.sum(dtype=torch.int64) * 31 + whole[::7].sum(dtype=torch.int64) + last.sum())
    numbers = torch.stack(sums).tolist() if sums else []
    return zlib.crc32(repr(numbers).encode())


def find_ranks(group: Any = None) -> Ranks:
    """The processes that an optimizer works with.

    Args:
        group: A group of torch.distributed; None is the default one where torch.distributed is initialised with several
            processes, False none in any case.

    Raises:
        ConfigError: It is none of these, or this process is not in the group.
    """
    if group is False or not dist.is_available() or not dist.is_initialized():
        if group is None or group is False:
            return ALONE
        raise ConfigError("process_group: torch.distributed is not initialised; call init_process_group first")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"process_group: a group of torch.distributed, None or False, found a {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ConfigError("process_group: this process is not in the group")
    return ALONE if dist.get_world_size(group) == 1 else Processes(group)
