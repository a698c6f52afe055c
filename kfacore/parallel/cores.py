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

from kfacore.parallel.pace import current_pace

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


def share(jobs: Sequence[Callable[[], _Result]], costs: Sequence[float], device: torch.device) -> list[_Result]:
    """``[job() for job in jobs]``, on a CPU several at a time, and counted towards the pace of the caller's thread.

    The torch threads of the caller are divided among as many jobs as the largest of them lets run for the whole time:
    with one large factor and many small ones there is nothing to run beside it, and it gets all threads.

    Args:
        jobs: Independent of each other. They run without gradients.
        costs: Of each job, in operations: d^3 for a Cholesky factor and inverse. The costliest begin first; after each
            the thread rests if its pace says so (`kfacore.parallel.pace`).
        device: Where the jobs compute. A GPU is kept busy by one thread.

    Raises:
        Exception: Whatever a job raised, that of the earliest; the others have ended.
    """
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


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Who does what, for processes that divide factors among themselves: largest first, each to the least busy.

    A pure function of its arguments, so that all processes agree without a word. No rank has more than the mean load
    plus one job (Graham 1969: at most 4/3 of the best division).

    Args:
        costs: Of each job, at least 0.
        ranks: Number of processes, at least 1.

    Returns:
        The rank of each job, in 0..ranks-1; of equal loads the lowest rank is taken, of equal costs the earliest job.
    """
    loads, found = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        found[i] = min(range(ranks), key=loads.__getitem__)
        loads[found[i]] += costs[i]
    return found
