"""What a step costs: K-FAC against torch's SGD with momentum on the same model and batch, interleaved.

The mean runs over whole refresh cycles (T_3 = 20, candidates of gamma every 20 steps, lambda every 5), so refreshes
are included in their proportion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.interleave import interleave
from benchmarks.nets import NETS, build, images
from kfacore import KFAC

__all__ = ["main"]


def sgd_step(model: nn.Module, batch: Callable[[int], Tensor]) -> Callable[[int], None]:
    """Torch's SGD with momentum on the Bernoulli negative log-likelihood."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run(turn: int) -> None:
        x = batch(turn)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="none").sum(1).mean()
        loss.backward()
        optimizer.step()

    return run


def kfac_step(model: nn.Module, batch: Callable[[int], Tensor], approx: str, tolerance: float) -> Callable[[int], None]:
    """K-FAC with everything adaptive: tau_1 = 1/8, tau_2 = 1/4, T_1 = 5, T_2 = T_3 = 20."""
    optimizer = KFAC(
        model,
        likelihood="bernoulli",
        approx={"kind": approx} if approx != "tridiag" else {"kind": approx, "tolerance": tolerance},
        estimator={"kind": "monte-carlo", "tau1": 0.125},
        damping={"kind": "levenberg-marquardt", "lambda0": 1.0},
        momentum={"kind": "quadratic-model", "tau2": 0.25},
    )

    def run(turn: int) -> None:
        x = batch(turn)
        optimizer.step(x, x)

    return run


def main(arguments: list[str]) -> int:
    """Print the ratios, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument(
        "--turns", type=int, default=60, help="counted steps; a multiple of 20 keeps refreshes in proportion"
    )
    parser.add_argument("--approx", action="append", help="repeatable; blockdiag and tridiag if left out")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of tridiag")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    data = images(device)
    order = torch.Generator().manual_seed(0)
    batches = [data[torch.randperm(len(data), generator=order)[: options.batch].to(device)] for _ in range(20)]

    def batch(turn: int) -> Tensor:
        return batches[turn % len(batches)]

    contenders = {"sgd": sgd_step(build(options.net, device), batch)}
    for approx in options.approx or ["blockdiag", "tridiag"]:
        contenders[approx] = kfac_step(build(options.net, device), batch, approx, options.tolerance)
    # Warm-up ends before a multiple of 20 plus 1, past the three refreshes of the first steps.
    timings = interleave(contenders, options.turns, warmup=20)

    reference = timings["sgd"]
    print(
        f"{options.net} net, batch {options.batch}, {options.turns} steps, {torch.get_num_threads()} threads, {device}"
    )
    print(f"{'':12}{'mean ms':>9}{'median ms':>11}{'slowest ms':>12}{'mean / sgd':>12}{'median / sgd':>14}")
    rows = {}
    for name, timing in timings.items():
        ratio, middle = timing.mean / reference.mean, timing.median / reference.median
        rows[name] = {"mean": timing.mean, "median": timing.median, "slowest": timing.slowest, "ratio": ratio}
        milliseconds = [1e3 * value for value in (timing.mean, timing.median, timing.slowest)]
        print(
            f"{name:12}{milliseconds[0]:9.1f}{milliseconds[1]:11.1f}{milliseconds[2]:12.1f}{ratio:12.2f}{middle:14.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"net": options.net, "batch": options.batch, "rows": rows}, indent=2))
    return 0
