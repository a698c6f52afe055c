"""The points that the model is checked against: `KFAC` on a few processes of this machine, joined by gloo.

Each process has one thread and its part of the mini-batch. Bytes are those that the optimizer counts as handed over
(``optimizer.ranks.sent``), and must be the model's to the byte. Seconds are compared after the machine's rates were
fitted to the run of one process, and its link to the messages that two processes exchange by themselves; of N
processes on fewer cores each has its share of them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import distributed as dist

from benchmarks.ranks.crew import Crew, Step
from benchmarks.ranks.model import Cost, Machine, Schedule, cost
from benchmarks.ranks.shapes import Net
from benchmarks.report import Report
from kfacore.network.vectors import entries_of
from kfacore.roles.block import Block

__all__ = ["Point", "bytes_of", "fitted", "link", "measure", "table"]

_FIRST = 4
"""Steps that are not counted: the first three refresh."""

_FLAGS = 2
"""Numbers that travel with an inverse: whether it went well."""


@dataclass(frozen=True)
class Point:
    """One process of a run.

    Attributes:
        ordinary: Median seconds of a step that neither refreshes nor adapts.
        due: Seconds that a refresh adds to one.
        gradient: Bytes of gradients in an ordinary step.
        small: Bytes of all else in an ordinary step.
        statistics: Bytes of statistics in a refresh.
        inverses: Bytes of inverses in a refresh.
        work: Seconds of the processor that a refresh adds.
    """

    ordinary: float
    due: float
    gradient: int
    small: int
    statistics: int
    inverses: int
    work: float


def measure(widths: Sequence[int], batch: int, ranks: int, cycles: int = 2, cycle: int = 10) -> list[Point]:
    """Train a chain of these widths on so many processes.

    Args:
        widths: Of its layers, inputs and outputs included.
        batch: Examples of the whole mini-batch.
        ranks: N.
        cycles: Refreshes that are counted.
        cycle: Steps from one to the next.

    Returns:
        What each process saw.

    Raises:
        RuntimeError: A process failed.
    """
    with Crew(widths, batch, ranks, cycle=cycle) as crew:
        crew.turn(_FIRST - 1)
        return [_point(steps) for steps in crew.turn(cycle * (cycles + 1) - _FIRST + 1)]


def _point(steps: Sequence[Step]) -> Point:
    usual = [step for step in steps if not (step.refreshed or step.adapted)]
    due = [step for step in steps if step.refreshed]
    plain = [step for step in steps if step.adapted and not step.refreshed] or usual  # a refresh adapts as well
    each = {what: int(median(step.sent.get(what, 0) for step in due)) for what in ("statistics", "inverses")}
    gradient = int(median(step.sent.get("gradient", 0) for step in usual))
    return Point(
        ordinary=median(step.seconds for step in usual),
        due=max(0.0, median(step.seconds for step in due) - median(step.seconds for step in plain)),
        gradient=gradient,
        small=int(median(sum(step.sent.values()) for step in usual)) - gradient,
        work=max(0.0, median(step.work for step in due) - median(step.work for step in plain)),
        **each,
    )


def bytes_of(net: Net, ranks: int) -> tuple[int, int, int]:
    """Bytes of a step's gradients, a refresh's statistics, and the inverses of the process that sends most of them.

    Gradients travel as they lie, with the entries that pad rows of wide blocks (`kfacore.network.vectors`).
    """
    if ranks == 1:
        return 0, 0, 0
    flags = 4 * _FLAGS
    gradient = sum(4 * entries_of(Block("", block.d_in, block.d_out, bias=True)) for block in net.blocks)
    inverses = max(
        sum(4 * (d * (d + 1) // 2) + flags for d in sides)
        for sides in net.owned([float(d) ** 3 for d in net.order], ranks)
    )
    statistics = sum(4 * (d * (d + 1) // 2) for d in net.sides)
    return gradient, statistics, inverses


_UNIT = Machine("unit", 1.0, 1.0, 1.0, 1.0, 1.0, 1, 0.0)


def fitted(net: Net, alone: Point, near: float, latency: float, schedule: Schedule) -> Machine:
    """This machine: rates with which the model of one process takes what it took.

    Args:
        net: The net.
        alone: The run of one process.
        near: Bytes a second between processes.
        latency: Of a message.
        schedule: Statistics and refreshes; the step of `KFAC` has more than the gradient of the model, which is part of
            the rate.
    """
    unit = cost(net, _UNIT, 1, "every", schedule)
    rate = (unit.gradient + unit.solve) / alone.ordinary
    refresh = unit.refresh * schedule.every
    return Machine("this machine", rate, rate, refresh / alone.due if alone.due else 1e12, near, near, 64, latency)


def modelled(net: Net, machine: Machine, ranks: int, schedule: Schedule, cores: int) -> tuple[float, float]:
    """Seconds of an ordinary step, and of what a refresh adds, on so many cores."""
    found: Cost = cost(net, machine, ranks, "every", schedule)
    crowded = max(1.0, ranks / cores)
    exchange = 0.0 if ranks == 1 else 2.0 * (ranks - 1) / ranks * found.ordinary / machine.near + machine.latency
    ordinary = (found.gradient + found.solve) * crowded + exchange  # `KFAC` hides sums behind nothing
    return ordinary, schedule.every * (found.refresh * crowded + found.moments + found.inverses)


def link(size: int) -> tuple[float, float]:
    """Bytes a second in sums between two processes here, and the seconds of an empty one.

    Args:
        size: Bytes of a sum.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        live = [context.Process(target=_sums, args=(rank, folder, size, queue), daemon=True) for rank in range(2)]
        for process in live:
            process.start()
        seconds, latency = queue.get(timeout=600)
        for process in live:
            process.join()
    return size / max(seconds - latency, 1e-9), latency


def _sums(rank: int, folder: str, size: int, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for tensor in (torch.zeros(size // 4), torch.zeros(1)):
        times = []
        for _ in range(8):
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        found.append(median(times[2:]))
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def table(
    report: Report,
    title: str,
    net: Net,
    found: dict[int, list[Point]],
    machine: Machine,
    schedule: Schedule,
    cores: int,
) -> None:
    """Measured and modelled side by side.

    Args:
        report: Where it goes.
        title: What was measured.
        net: The net.
        found: What each process saw, by the number of processes.
        machine: This machine, as `fitted`.
        schedule: Of the runs.
        cores: Of this machine.
    """
    seconds, sizes = [], []
    for ranks, points in found.items():
        ordinary, due = modelled(net, machine, ranks, schedule, cores)
        whole = sum(point.work for point in points)
        costs = [float(d) ** 3 for d in net.order]
        busiest = max(sum(float(d) ** 3 for d in sides) for sides in net.owned(costs, ranks)) / sum(costs)
        seconds.append(
            {
                "processes": ranks,
                "ordinary ms": 1e3 * max(point.ordinary for point in points),
                "model ms": 1e3 * ordinary,
                "refresh adds ms": 1e3 * max(point.due for point in points),
                "model adds ms": 1e3 * due,
                "busiest share of factor work": max(point.work for point in points) / whole if whole else None,
                "share, model": busiest,
            }
        )
        model = bytes_of(net, ranks)
        measured = [max(getattr(point, what) for point in points) for what in ("gradient", "statistics", "inverses")]
        small = max(point.small for point in points)
        sizes.append(
            {
                "processes": ranks,
                "gradient": measured[0],
                "gradient, model": model[0],
                "other bytes of an ordinary step": small,
                "sent / gradient": 1.0 + small / measured[0] if measured[0] else None,
                "statistics": measured[1],
                "statistics, model": model[1],
                "inverses, busiest": measured[2],
                "inverses, model": model[2],
                "as the model": "yes" if list(model) == measured else "no",
            }
        )
    report.table(f"{title}: seconds", seconds)
    report.table(f"{title}: bytes that a process hands over", sizes)
