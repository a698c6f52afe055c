"""How the cost grows with the width of the layers: eight square layers, steps timed singly.

The mean of a cycle of T_3 = 20 steps is put together from ordinary steps and refreshes: 20 steps of the widest nets
would take minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.contenders import APPROXIMATIONS, kfac, torch_step
from benchmarks.nets import build_chain
from benchmarks.report import Report

__all__ = ["main", "measure"]

_DEPTH, _PERIOD = 8, 20
_REFRESHES, _ORDINARY = (2, 3), (4, 6, 7)
"""Steps that refresh (the first one also allocates), and steps that neither refresh nor adapt."""


def _seconds(run: object, turn: int, device: torch.device) -> float:
    start = time.perf_counter()
    run(turn)  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(report: Report, widths: list[int], batch: int, device: torch.device, names: list[str]) -> None:
    """Add one table to the report."""
    rows = []
    for width in widths:
        x = torch.rand(batch, width, generator=torch.Generator().manual_seed(0)).to(device)

        def batches(turn: int, x: Tensor = x) -> Tensor:
            return x

        sizes = (width,) * (_DEPTH + 1)
        step = torch_step(build_chain(sizes, device), batches, "sgd")
        sgd = median([_seconds(step, turn, device) for turn in range(5)][1:])
        for name in names:
            optimizer = kfac(build_chain(sizes, device), APPROXIMATIONS[name])
            times = [_seconds(lambda _, o=optimizer, x=x: o.step(x, x), turn, device) for turn in range(max(_ORDINARY))]
            ordinary = median(times[k - 1] for k in _ORDINARY)
            refresh = median(times[k - 1] for k in _REFRESHES)
            mean = (ordinary * (_PERIOD - 1) + refresh) / _PERIOD
            rows.append(
                {
                    "": f"{width} {name}",
                    "sgd ms": 1e3 * sgd,
                    "ordinary ms": 1e3 * ordinary,
                    "refresh ms": 1e3 * refresh,
                    "ordinary / sgd": ordinary / sgd,
                    "refresh / sgd": refresh / sgd,
                    "mean / sgd": mean / sgd,
                }
            )
    report.table(f"width: {_DEPTH} layers, batch {batch}, T_3 {_PERIOD}, {torch.get_num_threads()} threads", rows)


def main(arguments: list[str]) -> int:
    """Print the growth, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks width", description=__doc__)
    parser.add_argument("--width", type=int, action="append", help="repeatable; 512, 1024 and 2048 if left out")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--approx", choices=list(APPROXIMATIONS), action="append", help="repeatable; all if left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("width")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = options.approx or list(APPROXIMATIONS)
    measure(report, options.width or [512, 1024, 2048], options.batch, device, names)
    report.save(options.json)
    return 0
