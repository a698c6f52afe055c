"""The slowest step against the median one, with the refresh in its step and in the background.

Nothing takes turns here: a worker that goes on during somebody else's turn would be timed with the wrong one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.contenders import APPROXIMATIONS, Batches, kfac, kfac_step
from benchmarks.interleave import interleave
from benchmarks.nets import NETS, build
from benchmarks.report import Report

__all__ = ["main", "measure"]


def measure(report: Report, net: str, batch: int, device: torch.device, turns: int, modes: list[str]) -> None:
    """Add one table to the report."""
    batches = Batches(device, batch)
    rows = []
    for name in ("blockdiag", "tridiag"):
        for mode in modes:
            step = kfac_step(kfac(build(net, device), APPROXIMATIONS[name], refresh=mode), batches)
            timing = interleave({name: step}, turns, warmup=20)[name]
            rows.append(
                {
                    "": f"{name}, {mode}",
                    "mean ms": 1e3 * timing.mean,
                    "median ms": 1e3 * timing.median,
                    "slowest ms": 1e3 * timing.slowest,
                    "slowest / median": timing.slowest / timing.median,
                }
            )
    report.table(f"spike: {net} net, batch {batch}, {turns} steps, {torch.get_num_threads()} threads, {device}", rows)


def main(arguments: list[str]) -> int:
    """Print the spikes, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks spike", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("spike")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure(report, options.net, options.batch, device, options.turns, ["inline", "background"])
    report.save(options.json)
    return 0
