r"""Factorisations side by side: a factor a core, in place of all cores on one factor after another.

A LAPACK routine meets at a barrier for every few columns. On cores of its own that wastes some of the time; on cores
that other work shares it wastes nearly all, because threads wait at a barrier by spinning, and an eigenproblem can then
take a hundred times as long. A factor on a thread of its own meets nobody, and a net has factors enough for all cores.
What is computed does not depend on which thread does it, nor on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

import torch

from kfacore.parallel.division import Wire, divided, owners
from kfacore.parallel.pace import current_pace
from kfacore.parallel.ranks import current_ranks

__all__ = ["owners", "share", "torch_threads"]

_Result = TypeVar("_Result")

_WORTH_A_THREAD = 1e8
"""Operations below which starting threads costs more than it gains, a few milliseconds of work."""


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with a number of CPU threads; the process gets its own back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(
    jobs: Sequence[Callable[[], _Result]],
    costs: Sequence[float],
    device: torch.device,
    wire: Wire[_Result] | None = None,
) -> list[_Result]:
    """``[job() for job in jobs]``, on a CPU several at a time, and counted towards the pace of the caller's thread.

    Several processes that divide their work (`kfacore.parallel.ranks.Ranks.dividing`) do each its own jobs, if there is
    a wire; without one each does all.

    The torch threads of the caller are divided among as many jobs as the largest of them lets run for the whole time:
    with one large factor and many small ones there is nothing to run beside it, and it gets all threads.

    Args:
        jobs: Independent of each other. They run without gradients.
        costs: Of each job, in operations: d^3 for a Cholesky factor and inverse. The costliest begin first; after each
            the thread rests if its pace says so (`kfacore.parallel.pace`).
        device: Where the jobs compute. A GPU is kept busy by one thread.
        wire: How a result travels to other processes.

    Raises:
        Exception: Whatever a job raised, that of the earliest; the others have ended.
    """
    ranks = current_ranks()
    if ranks is None or wire is None:
        return _share_here(jobs, costs, device)

    def run(mine: list[int]) -> list[_Result]:
        return _share_here([jobs[i] for i in mine], [costs[i] for i in mine], device)

    found = divided(ranks, costs, run, wire, device)
    pace = current_pace()
    if pace is not None:  # schedules count what the busiest does, the same number on all
        loads = [0.0] * ranks.size
        for cost, owner in zip(costs, owners(costs, ranks.size), strict=True):
            loads[owner] += cost
        pace.work(max(loads) - loads[ranks.rank])
    return found


def _share_here(jobs: Sequence[Callable[[], _Result]], costs: Sequence[float], device: torch.device) -> list[_Result]:
    """All jobs in this process."""
    threads, pace = torch.get_num_threads(), current_pace()
    total = sum(costs)
    abreast = 1
    if device.type == "cpu" and jobs:
        abreast = max(1, min(threads, len(jobs), round(total / max(costs))))
    left = sorted(range(len(jobs)), key=costs.__getitem__)
    results: dict[int, _Result] = {}
    failures: dict[int, BaseException] = {}

    def work() -> None:
        torch.set_num_threads(threads // abreast)
        with torch.no_grad():
            while left:
                try:
                    i = left.pop()
                except IndexError:  # another thread took the last one
                    return
                try:
                    results[i] = jobs[i]()
                except Exception as error:
                    failures[i] = error
                if pace is not None:
                    pace.work(costs[i])

    helpers = [Thread(target=work, name="kfac-factor") for _ in range(abreast - 1) if total > _WORTH_A_THREAD]
    try:
        for helper in helpers:
            helper.start()
        work()
    finally:
        left.clear()  # interrupted: nothing new begins
        for helper in helpers:
            if helper.is_alive():  # one that could not start cannot be waited for
                helper.join()
        torch.set_num_threads(threads)
    if failures:
        raise failures[min(failures)]
    return [results[i] for i in range(len(jobs))]
