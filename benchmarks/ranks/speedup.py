"""Two processes of one thread each against one process of one thread: wall time, taking turns.

A turn is a whole cycle, from one refresh to the next, so that everything is in it in its proportion. What both
processes do alike does not get faster: with a share s of it the ratio is 2 / (1 + s) at most (Amdahl). Nor are two
cores twice one where they share a cache, memory or a clock: beside the crews stands what matrix products alone gain.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from benchmarks.ranks.crew import CYCLE, Crew
from benchmarks.report import Report

__all__ = ["TARGET", "compare"]

TARGET = 1.6

PRODUCTS = 400
"""Products of matrices in a turn, all by one process or half by each of two."""

_CREWS = {"one process": (1, "all"), "two processes": (2, "all"), "two, memory = owner": (2, "owner")}


def compare(
    report: Report, widths: Sequence[int], batch: int, turns: int, cycle: int = CYCLE, products: int = PRODUCTS
) -> dict[str, float]:
    """Take turns, and print what each crew took.

    Args:
        report: Where it goes.
        widths: Of the chain.
        batch: Examples of the whole mini-batch.
        turns: Turns of each crew; one before them is not counted.
        cycle: Steps of a turn.
        products: Products of matrices that the machine is measured with.

    Returns:
        How many times as fast as one process each crew is, by median turns.
    """
    wall: dict[str, list[float]] = {name: [] for name in _CREWS}
    work: dict[str, list[float]] = {name: [] for name in _CREWS}
    plain: dict[str, list[float]] = {name: [] for name in _CREWS}
    sent: dict[str, float] = {}
    with ExitStack() as stack:
        crews = {
            name: stack.enter_context(Crew(widths, batch, ranks, cycle=cycle, memory=memory))
            for name, (ranks, memory) in _CREWS.items()
        }
        for turn in range(turns + 1):
            for name, crew in crews.items():
                start = time.perf_counter()
                found = crew.turn(cycle)
                middle = time.perf_counter()
                crew.multiply(products // _CREWS[name][0])
                if turn:
                    wall[name].append(middle - start)
                    plain[name].append(time.perf_counter() - middle)
                    work[name].append(max(sum(step.work for step in steps) for steps in found))
                    sent[name] = max(sum(sum(step.sent.values()) for step in steps) for steps in found)
    times = {name: median(each) for name, each in wall.items()}
    ratios = {name: times["one process"] / seconds for name, seconds in times.items()}
    most = {name: median(plain["one process"]) / median(plain[name]) for name in _CREWS}
    rows = [
        {
            "": name,
            "ms a step": 1e3 * times[name] / cycle,
            "processor ms a step": 1e3 * median(work[name]) / cycle,
            "MB sent a step": sent[name] / cycle / 1e6,
            "times as fast": ratios[name],
            "products alone": most[name],
            "share that is not divided": max(0.0, 2.0 / ratios[name] - 1.0) if name != "one process" else None,
        }
        for name in _CREWS
    ]
    net = "-".join(map(str, widths))
    report.table(f"{net}, batch {batch}, {turns} turns of {cycle} steps, target {TARGET:g}", rows)
    return ratios
