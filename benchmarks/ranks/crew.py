"""Processes that train together and wait between turns: what a few of them take, beside what one takes.

A turn is asked for and answered over a pipe, so that crews take turns in one program and idle ones use no processor.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist

from benchmarks.contenders import kfac
from benchmarks.nets import build_chain

__all__ = ["CYCLE", "Crew", "Step"]

CYCLE = 20
"""Steps from one refresh to the next."""

_WIDTH = 1000
"""Of matrices that are multiplied to see what the machine gives."""

_PATIENCE = 3600.0
"""Seconds that a turn may take."""


@dataclass(frozen=True)
class Step:
    """One step of one process.

    Attributes:
        seconds: On the clock.
        work: Of the processor.
        sent: Bytes handed over, by what they were.
        refreshed: Whether there was a new inverse.
        adapted: Whether the objective was asked for after the step.
    """

    seconds: float
    work: float
    sent: dict[str, int]
    refreshed: bool
    adapted: bool


class Crew:
    """Processes of one thread each that train a chain with the default preset, joined by gloo.

    Args:
        widths: Of the chain, inputs and outputs included.
        batch: Examples of the whole mini-batch.
        ranks: How many.
        cycle: Steps from one refresh to the next.
        memory: ``approx.memory``.
    """

    def __init__(
        self, widths: Sequence[int], batch: int, ranks: int, *, cycle: int = CYCLE, memory: str = "all"
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "kfacore", "benchmarks.contenders"])
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(ranks)]
        self._pipes = [here for here, _ in pipes]
        given = [
            (rank, ranks, self._folder.name, tuple(widths), batch, cycle, memory, there)
            for rank, (_, there) in enumerate(pipes)
        ]
        self._live = [context.Process(target=_live, args=each, daemon=True) for each in given]
        for process in self._live:
            process.start()
        for _, there in pipes:
            there.close()

    def turn(self, steps: int) -> list[list[Step]]:
        """What each process has seen in so many steps.

        Raises:
            RuntimeError: A process failed; its message is above.
        """
        return self._ask("steps", steps)

    def multiply(self, times: int) -> None:
        """Multiply matrices in place of a turn, all processes at once: what the machine's cores give."""
        self._ask("products", times)

    def _ask(self, *what: str | int) -> list[list[Step]]:
        try:
            for pipe in self._pipes:
                pipe.send(what)
            found = []
            for pipe in self._pipes:
                if not pipe.poll(_PATIENCE):
                    raise RuntimeError("a process takes more than an hour for a turn")
                found.append(pipe.recv())
        except (EOFError, OSError) as error:
            raise RuntimeError("a process failed, its message is above") from error
        return found

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # it has gone already
                continue
        for process in self._live:
            process.join(30 if error is None else 1)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _live(
    rank: int, ranks: int, folder: str, widths: tuple[int, ...], batch: int, cycle: int, memory: str, pipe: Any
) -> None:
    """Train as long as steps are asked for."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    approx = {"kind": "blockdiag", "memory": memory}
    optimizer = kfac(build_chain(widths, torch.device("cpu")), approx, refresh_every=cycle)
    x = torch.rand(batch, widths[0], generator=torch.Generator().manual_seed(0)).tensor_split(ranks)[rank]
    matrix = torch.rand(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0))
    while asked := pipe.recv():
        what, times = asked
        found = []
        for _ in range(times):
            if what == "products":
                torch.mm(matrix, matrix)
                continue
            before, used, start = Counter(optimizer.ranks.sent), time.process_time(), time.perf_counter()
            report = optimizer.step(x, x)
            adapted = optimizer.damping.adapts(optimizer.steps)
            seconds, work = time.perf_counter() - start, time.process_time() - used
            sent = {what: total - before[what] for what, total in optimizer.ranks.sent.items()}
            found.append(Step(seconds, work, sent, report.refreshed, adapted))
        pipe.send(found)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
