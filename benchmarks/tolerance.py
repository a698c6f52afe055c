"""What the tolerance of the tridiagonal form trades: how close the update stays, against what it costs.

One net is trained for a while; then, from the same moments, gradient and damping, the inverse is made anew at each
tolerance. Compared are the update itself with the untruncated one, and how far it lets the exact quadratic model fall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Batches, kfac, kfac_step
from benchmarks.nets import NETS, build
from benchmarks.report import Report
from kfacore import KFAC
from kfacore.network import BlockVector
from kfacore.optim.local import LocalModel
from kfacore.optim.quadratic import model_value
from kfacore.registry import get_registry
from kfacore.roles.inverse import Inverse

__all__ = ["main", "measure"]

_TOLERANCES = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3, 1.0)


def _timed(run: Callable[[], Any], device: torch.device, turns: int = 3) -> tuple[Any, float]:
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)


def _decrease(optimizer: KFAC, update: Sequence[Tensor], x: Tensor) -> float:
    """How far the exact model falls with the step that would be taken, re-scaling and momentum included."""
    directions, eta = optimizer._directions, optimizer.weight_decay
    batch = optimizer.linearizer(x, len(x))
    bound = optimizer.loss.bind(batch.outputs(), x)
    directions.backward(batch, bound)
    grad = directions.gradient(eta)
    proposal = BlockVector.zeros(optimizer.linearizer.layers)
    for block, value in zip(proposal.blocks, update, strict=True):
        block.copy_(-value)
    cases = batch.model_cases(optimizer.momentum.cases(batch.cases))
    local = LocalModel(batch, bound, grad, optimizer.damping.lam, eta, cases)
    M, b = directions.planes(local, [proposal], moving=optimizer.steps > 0)
    return float(-model_value(M, b, optimizer.momentum.coefficients(M, b)))


def measure(report: Report, net: str, device: torch.device, steps: int = 60) -> None:
    """Add one table to the report."""
    batches = Batches(device, 1000)
    optimizer = kfac(build(net, device), {"kind": "tridiag", "tolerance": 0.0})
    step = kfac_step(optimizer, batches)
    for turn in range(steps):
        step(turn)
    assert optimizer.preconditioner is not None
    x = batches(steps)
    batch = optimizer.linearizer(x, len(x))
    bound = optimizer.loss.bind(batch.outputs(), x)
    optimizer._directions.backward(batch, bound)
    grad = [block.clone() for block in optimizer._directions.gradient(optimizer.weight_decay).blocks]
    moments, gamma = optimizer.preconditioner.moments, optimizer.damping.gamma
    registry, config = get_registry(), optimizer.approx.config

    def inverse_at(tolerance: float) -> Inverse:
        approx = registry.build("approx", config.model_copy(update={"tolerance": tolerance}))
        return approx.factorise(moments).damped(gamma, pi=optimizer.damping.config.pi)

    rows: list[dict[str, Any]] = []
    exact, best = None, 0.0
    for tolerance in _TOLERANCES:
        inverse, refresh = _timed(lambda t=tolerance: inverse_at(t), device)
        blocks, solve = _timed(lambda i=inverse: i.solve(grad), device)
        update = torch.cat([block.reshape(-1) for block in blocks]).double()
        decrease = _decrease(optimizer, blocks, x)
        if exact is None:
            exact, best = update, decrease
        rows.append(
            {
                "tolerance": f"{tolerance:g}",
                "cosine": f"{float(update @ exact / (update.norm() * exact.norm())):.6f}",
                "relative error": float((update - exact).norm() / exact.norm()),
                "decrease / untruncated": f"{decrease / best:.5f}",
                "kept of A": f"{_kept(inverse, 'A'):.0%}",
                "kept of G": f"{_kept(inverse, 'G'):.0%}",
                "refresh ms": 1e3 * refresh,
                "solve ms": 1e3 * solve,
            }
        )
    title = f"tolerance: {net} net after {steps} steps, gamma {float(gamma):.3g}, {torch.get_num_threads()} threads"
    report.table(title, rows)


def _kept(inverse: Inverse, side: str) -> float:
    """Share of the canonical correlations of a side that are kept."""
    pairs = inverse.state_dict()[side]
    blocks = [layer.shape for layer in inverse.layers]
    dims = [shape[1] if side == "A" else shape[0] for shape in blocks]
    total = sum(min(pair) for pair in pairwise(dims))
    return float(sum(len(pair["s"]) for pair in pairs)) / total


def main(arguments: list[str]) -> int:
    """Print the trade, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tolerance", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--steps", type=int, default=60, help="of training before the inverse is looked at")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("tolerance")
    measure(report, options.net, torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.steps)
    report.save(options.json)
    return 0
