r"""Factorisations side by side: a factor a core, in place of all cores on one factor after another.

A LAPACK routine meets at a barrier for every few columns. On cores of its own that wastes some of the time; on cores
that other work shares it wastes nearly all, because threads wait at a barrier by spinning, and an eigenproblem can then
take a hundred times as long. A factor on a thread of its own meets nobody, and a net has factors enough for all cores.
What is computed does not depend on which thread does it, nor on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import TypeVar

import torch

from kfacore.parallel.pace import current_pace

__all__ = ["on_each_core", "torch_threads"]

_Item = TypeVar("_Item")
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


def on_each_core(
    job: Callable[[_Item], _Result], items: Sequence[_Item], costs: Sequence[float], device: torch.device
) -> list[_Result]:
    """``[job(item) for item in items]``, on a CPU several at a time.

    The torch threads of the caller are divided among as many jobs as the largest of them lets run for the whole time:
    with one large factor and many small ones there is nothing to run beside it, and it gets all threads.

    Args:
        job: Independent of the other items. It runs without gradients.
        items: What to call it with.
        costs: Of each item, in the operations of `kfacore.parallel.pace.worked`; the costliest begin first.
        device: Where the job computes. A GPU is kept busy by one thread.

    Raises:
        Exception: Whatever a job raised, that of the earliest item; the others have ended.
    """
    threads, pace = torch.get_num_threads(), current_pace()
    total = sum(costs)
    abreast = 1
    if device.type == "cpu" and items:
        abreast = max(1, min(threads, len(items), round(total / max(costs))))
    left = sorted(range(len(items)), key=costs.__getitem__)
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
                    results[i] = job(items[i])
                except Exception as error:
                    failures[i] = error

    def help_out() -> None:
        with pace or nullcontext():
            work()

    helpers = [Thread(target=help_out, name="kfac-factor") for _ in range(abreast - 1) if total > _WORTH_A_THREAD]
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
    return [results[i] for i in range(len(items))]
