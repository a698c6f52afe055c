"""Peak memory of training, beyond what the process and the data take, against Adam on the same model and batch.

Each contender trains in a process of its own. On a CPU the peak of the resident set is read, which includes the
workspace of the matrix library; on a GPU the peak of what torch has allocated.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contenders import APPROXIMATIONS, DEFAULTS, Batches, kfac, kfac_step, torch_step
from benchmarks.nets import NETS, build
from benchmarks.report import Report

__all__ = ["main", "measure"]

_STEPS = 21
"""Enough for the first refreshes, ordinary steps, and the refresh of step 20."""


def _resident() -> int:
    """Bytes of the process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak() -> int:
    """Most bytes of the process that ever were in memory; not getrusage's, which begins with those of the parent."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _peak_of(name: str, net: str, batch: int, gamma: str) -> int:
    """Bytes that training adds at its peak; runs in the child process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches(device, batch)
    torch.mm(torch.rand(512, 512, device=device), torch.rand(512, 512, device=device))  # the library's own buffers
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _resident() if device.type == "cpu" else torch.cuda.memory_allocated()
    model = build(net, device)
    if name in APPROXIMATIONS:
        step = kfac_step(kfac(model, APPROXIMATIONS[name], gamma=gamma), batches)
    else:
        step = torch_step(model, batches, name)
    for turn in range(_STEPS):
        step(turn)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated() - before)
    return _peak() - before


def measure(report: Report, net: str, batch: int, gamma: str = "tied") -> None:
    """Add one table to the report."""
    peaks = {}
    for name in ("adam", "sgd", *DEFAULTS):
        command = [sys.executable, "-m", "benchmarks", "memory", "--net", net, "--batch", str(batch)]
        done = subprocess.run(
            [*command, "--gamma", gamma, "--child", name], stdout=subprocess.PIPE, check=True, text=True
        )
        peaks[name] = int(done.stdout)
    rows = [{"": name, "peak MB": peak / 1e6, "/ adam": peak / peaks["adam"]} for name, peak in peaks.items()]
    report.table(f"memory: {net} net, batch {batch}, {_STEPS} steps, gamma {gamma}", rows)


def main(arguments: list[str]) -> int:
    """Print peaks and ratios, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--gamma", choices=["tied", "compared"], default="tied")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(_peak_of(options.child, options.net, options.batch, options.gamma))
        return 0
    report = Report("memory")
    measure(report, options.net, options.batch, options.gamma)
    report.save(options.json)
    return 0
