"""What a step costs: K-FAC against torch's SGD with momentum on the same model and batch, interleaved.

The mean runs over whole refresh cycles (a refresh every T_3 steps, lambda every 5), so refreshes are included in their
proportion. The share of the limit is the time that the step's operations would take at this machine's rate of
multiplying matrices, over the time they took.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.contenders import APPROXIMATIONS, Batches, Step, kfac, kfac_step, torch_step
from benchmarks.interleave import interleave
from benchmarks.limit import kfac_operations, multiplication_rate, sgd_operations
from benchmarks.nets import NETS, build
from benchmarks.report import Report

__all__ = ["main", "measure"]


def measure(
    report: Report,
    net: str,
    batch: int,
    device: torch.device,
    *,
    approximations: list[str],
    turns: int = 60,
    gamma: str = "tied",
    refresh_every: int = 20,
    refresh: str = "inline",
    adam: bool = True,
    tau2: float = 0.25,
) -> None:
    """Time the contenders and add one table to the report."""
    batches = Batches(device, batch)
    contenders: dict[str, Step] = {"sgd": torch_step(build(net, device), batches, "sgd")}
    if adam:
        contenders["adam"] = torch_step(build(net, device), batches, "adam")
    for name in approximations:
        optimizer = kfac(
            build(net, device),
            APPROXIMATIONS[name],
            gamma=gamma,
            refresh_every=refresh_every,
            refresh=refresh,
            tau2=tau2,
        )
        contenders[name] = kfac_step(optimizer, batches)
    # Warm-up passes the three refreshes of the first steps and ends on a multiple of T_3, early correlations being few.
    timings = interleave(contenders, turns, warmup=max(5, refresh_every))
    rate = multiplication_rate(device)
    widths = NETS[net]
    rows = []
    for name, timing in timings.items():
        operations = sgd_operations(widths, batch)
        if name in APPROXIMATIONS:
            approx = APPROXIMATIONS[name]
            operations = kfac_operations(
                widths, batch, approx["kind"], refresh_every=refresh_every, tempered="power" not in approx, tau2=tau2
            )
        truncated = name in ("tridiag", "tridiag, power 1")  # they do fewer operations than are counted
        rows.append(
            {
                "": name,
                "mean ms": 1e3 * timing.mean,
                "median ms": 1e3 * timing.median,
                "slowest ms": 1e3 * timing.slowest,
                "mean / sgd": timing.mean / timings["sgd"].mean,
                "median / sgd": timing.median / timings["sgd"].median,
                "slowest / median": timing.slowest / timing.median,
                "operations / sgd": None if truncated else operations / sgd_operations(widths, batch),
                "share of limit": None if truncated else operations / rate / timing.mean,
            }
        )
    title = (
        f"step: {net} net, batch {batch}, {turns} steps, T_3 {refresh_every}, tau_2 {tau2:g}, gamma {gamma}, "
        f"refresh {refresh}, {torch.get_num_threads()} threads, {device}, {rate / 1e9:.0f} GFLOP/s"
    )
    report.table(title, rows)


def main(arguments: list[str]) -> int:
    """Print the ratios, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), action="append", help="repeatable; mnist if left out")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; 1000 if left out")
    parser.add_argument("--refresh-every", type=int, action="append", help="T_3, repeatable; 20 if left out")
    parser.add_argument(
        "--turns", type=int, default=60, help="counted steps; a multiple of 20 keeps refreshes in proportion"
    )
    parser.add_argument("--approx", choices=list(APPROXIMATIONS), action="append", help="repeatable; all if left out")
    parser.add_argument("--gamma", choices=["tied", "compared"], default="tied")
    parser.add_argument("--tau2", type=float, default=0.25, help="share of the cases in the quadratic model")
    parser.add_argument("--refresh", choices=["inline", "background"], default="inline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("step")
    for net in options.net or ["mnist"]:
        for batch in options.batch or [1000]:
            for refresh_every in options.refresh_every or [20]:
                measure(
                    report,
                    net,
                    batch,
                    torch.device(options.device),
                    approximations=options.approx or list(APPROXIMATIONS),
                    turns=options.turns,
                    gamma=options.gamma,
                    refresh_every=refresh_every,
                    refresh=options.refresh,
                    tau2=options.tau2,
                )
    report.save(options.json)
    return 0
