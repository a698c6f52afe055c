"""All benchmarks but the times to a target: what `make bench` runs. Times to a target are a study of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import launches, memory, phases, refresh, spike, step, tolerance, width
from benchmarks.contenders import DEFAULTS, PLAIN
from benchmarks.report import Report

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Print every table, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report, ends = Report("all"), ["blockdiag", "tridiag"]  # where the form without truncation would only take time
    step.measure(report, "mnist", 1000, device, approximations=[*DEFAULTS, *PLAIN])
    step.measure(report, "mnist", 4000, device, approximations=DEFAULTS, turns=20, adam=False)
    step.measure(report, "mnist", 250, device, approximations=ends, turns=20, adam=False)
    step.measure(report, "curves", 1000, device, approximations=ends, turns=20)
    for period in (1, 5):
        step.measure(report, "mnist", 1000, device, approximations=ends, turns=5, refresh_every=period, adam=False)
    spike.measure(report, "mnist", 1000, device, 200, ["background"])
    phases.measure(report, "mnist", 1000, device, 20)
    refresh.measure(report, "mnist")
    tolerance.measure(report, "mnist", device)
    memory.measure(report, "mnist", 1000)
    width.measure(report, [512, 1024], 1000, device, ends)
    launches.measure(report, "mnist", device)
    report.save(options.json)
    return 0
