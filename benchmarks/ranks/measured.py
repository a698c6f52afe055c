"""The points that the model is checked against: `KFAC` on a few processes of this machine, joined by gloo.

Each has one thread and its part of the mini-batch. Bytes are those that the optimizer counts as handed over
(``optimizer.ranks.sent``); the share of factor work is that of the processor's time that a refresh adds to a step.
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

from benchmarks.contenders import kfac
from benchmarks.nets import build_chain
from benchmarks.ranks.model import Cost
from benchmarks.report import Report

__all__ = ["Point", "measure", "table"]

_CYCLE, _FIRST = 10, 4
"""Steps from one refresh to the next, and steps that are not counted: the first three refresh."""


@dataclass(frozen=True)
class Point:
    """One process of a run.

    Attributes:
        ordinary: Median seconds of a step that neither refreshes nor adapts.
        mean: Mean seconds of a step over whole cycles.
        sent: Bytes handed over in an ordinary step.
        due: Bytes handed over more in one that refreshes.
        work: Seconds of the processor that a refresh adds.
    """

    ordinary: float
    mean: float
    sent: float
    due: float
    work: float


def measure(widths: Sequence[int], batch: int, ranks: int, cycles: int = 2) -> list[Point]:
    """Train a chain of these widths on so many processes.

    Args:
        widths: Of its layers, inputs and outputs included.
        batch: Examples of the whole mini-batch.
        ranks: N.
        cycles: Refreshes that are counted.

    Returns:
        What each process saw.

    Raises:
        RuntimeError: A process failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "kfacore", "benchmarks.contenders"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        given = [(rank, ranks, folder, tuple(widths), batch, cycles, queue) for rank in range(ranks)]
        live = [context.Process(target=_live, args=each, daemon=True) for each in given]
        for process in live:
            process.start()
        found: dict[int, Point] = {}
        while len(found) < ranks:
            if any(process.exitcode not in (None, 0) for process in live):
                for process in live:
                    process.kill()
                raise RuntimeError("a process failed, its message is above")
            while not queue.empty():
                rank, point = queue.get()
                found[rank] = point
            time.sleep(0.05)
        for process in live:
            process.join()
    return [found[rank] for rank in range(ranks)]


def _live(rank: int, ranks: int, folder: str, widths: tuple[int, ...], batch: int, cycles: int, queue: Any) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    optimizer = kfac(build_chain(widths, torch.device("cpu")), {"kind": "blockdiag"}, refresh_every=_CYCLE)
    x = torch.rand(batch, widths[0], generator=torch.Generator().manual_seed(0)).tensor_split(ranks)[rank]
    sent: Any = optimizer.ranks.sent
    seconds, bytes_, work = list[float](), list[float](), list[float]()
    last = _CYCLE * (cycles + 1)
    for _ in range(last):
        before, used, start = sum(sent.values()), time.process_time(), time.perf_counter()
        optimizer.step(x, x)
        seconds.append(time.perf_counter() - start)
        work.append(time.process_time() - used)
        bytes_.append(float(sum(sent.values()) - before))
    numbers = range(1, last + 1)
    ordinary = [k - 1 for k in numbers if k >= _FIRST and k % 5]  # neither refreshed nor adapted
    due = [k - 1 for k in numbers if k % _CYCLE == 0]
    usual = median(bytes_[i] for i in ordinary)
    point = Point(
        ordinary=median(seconds[i] for i in ordinary),
        mean=sum(seconds[_CYCLE:]) / (last - _CYCLE),
        sent=usual,
        due=median(bytes_[i] for i in due) - usual,
        work=max(0.0, median(work[i] for i in due) - median(work[i] for i in ordinary)),
    )
    queue.put((rank, point))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def table(report: Report, title: str, found: dict[int, list[Point]], modelled: dict[int, Cost], gradient: int) -> None:
    """Measured and modelled side by side.

    Args:
        report: Where it goes.
        title: What was measured.
        found: What each process saw, by the number of processes.
        modelled: The model's costs, likewise.
        gradient: Bytes of the gradient.
    """
    rows = []
    for ranks, points in found.items():
        whole = sum(point.work for point in points)
        sent, due = max(point.sent for point in points), max(point.due for point in points)
        rows.append(
            {
                "processes": ranks,
                "ordinary ms": 1e3 * max(point.ordinary for point in points),
                "mean ms": 1e3 * max(point.mean for point in points),
                "sent MB": sent / 1e6,
                "sent / gradient": sent / gradient,
                "model MB": modelled[ranks].ordinary / 1e6,
                "refresh MB": due / 1e6,
                "refresh, model MB": modelled[ranks].due / 1e6,
                "busiest share": max(point.work for point in points) / whole if whole else None,
                "share, model": modelled[ranks].share,
            }
        )
    report.table(title, rows)
