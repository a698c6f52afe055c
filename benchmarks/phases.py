"""Where a step's time goes: gradient, statistics, refresh, solve, quadratic model, adaptation, bookkeeping.

Each phase is a part of `KFAC.step`, timed from outside on the host; on a GPU the device is waited for around each, so
the sum is larger than an undisturbed step.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import APPROXIMATIONS, DEFAULTS, Batches, kfac, kfac_step
from benchmarks.nets import NETS, build
from benchmarks.report import Report
from kfacore import KFAC

__all__ = ["main", "measure"]


class Phases:
    """Seconds of each phase of an optimizer's steps."""

    def __init__(self, optimizer: KFAC, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        iteration, directions = optimizer._iteration, optimizer._directions
        self._watch(iteration, "_begin", "forward")
        self._watch(directions, "backward", "gradient")
        self._watch(iteration, "_statistics", "statistics")
        self._watch(directions, "inverses", "refresh")
        self._watch(directions, "propose", "solve")
        self._watch(directions, "planes", "quadratic model")
        self._watch(iteration, "_judge", "adaptation")

    def _watch(self, owner: Any, method: str, phase: str) -> None:
        setattr(owner, method, self._timed(getattr(owner, method), phase))

    def _timed(self, inner: Callable[..., Any], phase: str) -> Callable[..., Any]:
        return _Timed(inner, phase, self.seconds, self._device)


class _Timed:
    """Calls through and adds the time; anything else is asked of what it stands for."""

    def __init__(self, inner: Any, phase: str, seconds: defaultdict[str, float], device: torch.device) -> None:
        self._inner, self._phase, self._seconds, self._device = inner, phase, seconds, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = _now(self._device)
        result = self._inner(*args, **kwargs)
        self._seconds[self._phase] += _now(self._device) - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(report: Report, net: str, batch: int, device: torch.device, turns: int = 40) -> None:
    """Add one table, milliseconds a step by phase, to the report."""
    batches = Batches(device, batch)
    columns: dict[str, dict[str, float]] = {}
    for name in DEFAULTS:
        optimizer = kfac(build(net, device), APPROXIMATIONS[name])
        phases, run = Phases(optimizer, device), kfac_step(optimizer, batches)
        for turn in range(20):
            run(turn)
        phases.seconds.clear()
        start = _now(device)
        for turn in range(turns):
            run(turn)
        total = _now(device) - start
        spent = dict(phases.seconds)
        spent["bookkeeping"] = total - sum(spent.values())
        columns[name] = {phase: 1e3 * seconds / turns for phase, seconds in spent.items()} | {
            "all": 1e3 * total / turns
        }
    order = ["forward", "gradient", "statistics", "refresh", "solve", "quadratic model", "adaptation", "bookkeeping"]
    rows = [{"ms a step": phase, **{name: columns[name][phase] for name in columns}} for phase in [*order, "all"]]
    report.table(f"phases: {net} net, batch {batch}, mean of {turns} steps, {device}", rows)


def main(arguments: list[str]) -> int:
    """Print milliseconds a step by phase, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks phases", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=40, help="a multiple of 20 keeps refreshes in proportion")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("phases")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure(report, options.net, options.batch, device, options.turns)
    report.save(options.json)
    return 0
