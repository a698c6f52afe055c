"""A refresh's eigenproblems and Cholesky inverses, a factor a core, against all cores on one factor after another.

With ``--beside N`` other processes keep the cores busy meanwhile, as other runs on the machine would.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import APPROXIMATIONS, Batches, kfac, kfac_step
from benchmarks.interleave import interleave
from benchmarks.nets import NETS, build
from benchmarks.report import Report
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.parallel.cores import share

__all__ = ["main", "measure"]

_BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(1000, 1000)\nwhile True: a @ a"


def _eigenproblem(M: Tensor) -> None:
    torch.linalg.eigh(M)


def _cholesky_inverse(M: Tensor) -> None:
    torch.cholesky_inverse(torch.linalg.cholesky(M))


def _factors(net: str, steps: int) -> list[Tensor]:
    """A and G of every layer after some training, damped."""
    device = torch.device("cpu")
    optimizer = kfac(build(net, device), APPROXIMATIONS["blockdiag"])
    step = kfac_step(optimizer, Batches(device, 1000))
    for turn in range(steps):
        step(turn)
    assert optimizer.preconditioner is not None
    moments, gamma = optimizer.preconditioner.moments, float(optimizer.damping.gamma)
    factors = [*moments[InputFactor], *moments[OutputFactor]]
    return [M + gamma * M.diagonal().mean().sqrt() * torch.eye(len(M)) for M in factors]


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Other processes that multiply matrices, each on one thread."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    time.sleep(5.0 if others else 0.0)  # until they have imported torch
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(report: Report, net: str, beside: int = 0, turns: int = 5, steps: int = 20) -> None:
    """Add one table to the report."""
    factors = _factors(net, steps)
    costs = [float(len(M)) ** 3 for M in factors]

    def one_after_another(job: Callable[[Tensor], None]) -> None:
        for M in factors:
            job(M)

    def side_by_side(job: Callable[[Tensor], None]) -> None:
        share([partial(job, M) for M in factors], costs, torch.device("cpu"))

    rows = []
    with _busy(beside):
        for label, job in (("eigenproblems", _eigenproblem), ("Cholesky inverses", _cholesky_inverse)):
            ways: Sequence[Callable[[Callable[[Tensor], None]], None]] = (one_after_another, side_by_side)
            timings = interleave({way.__name__: lambda _, w=way, j=job: w(j) for way in ways}, turns, warmup=1)
            loop, spread = timings["one_after_another"], timings["side_by_side"]
            ratios = [a / b for a, b in zip(loop.seconds, spread.seconds, strict=True)]
            rows.append(
                {
                    "": label,
                    "one after another, ms": 1e3 * loop.median,
                    "side by side, ms": 1e3 * spread.median,
                    "ratio": loop.median / spread.median,
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            )
    others = f", beside {beside} busy processes" if beside else ""
    report.table(
        f"refresh: {len(factors)} factors of the {net} net, {torch.get_num_threads()} threads, cpu{others}", rows
    )


def main(arguments: list[str]) -> int:
    """Print times of all factors, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks refresh", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="busy processes (a turn may take a minute)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("refresh")
    measure(report, options.net, options.beside, options.turns)
    report.save(options.json)
    return 0
