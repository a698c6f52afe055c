"""What a step costs on N ranks: by the model, as tables and a picture; and measured here, beside it.

The model's rates are arguments. Those it has by default are assumed, not measured: they are round numbers of the order
of a data-centre GPU of 2023, and a machine's own come from `benchmarks/gpu.sh`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.nets import NETS
from benchmarks.ranks.crew import CYCLE
from benchmarks.ranks.measured import fitted, link, measure, table
from benchmarks.ranks.model import VARIANTS, Machine, Schedule, cost
from benchmarks.ranks.shapes import NETS_BY_NAME, Net, chain
from benchmarks.ranks.speedup import compare
from benchmarks.report import Report

__all__ = ["ASSUMED", "COUNTS", "main", "tables"]

ASSUMED = Machine(
    name="assumed GPU",
    rate=4e14,
    products=1e14,
    factorisations=2e12,
    near=3e11,
    far=5e10,
    node=8,
    latency=1e-5,
)
"""400 and 100 TFLOP/s of products, 2 of factorisations, 300 and 50 GB/s, 10 microseconds."""

_SMALL = (48, 64, 24, 64, 48)
"""Widths of what `--quick` measures."""

COUNTS = [2**i for i in range(11)]
"""1 to 1,024 ranks."""


def tables(report: Report, net: Net, machine: Machine, schedule: Schedule, counts: Sequence[int]) -> None:
    """One table of steps, one of where the time of each variant goes on the most ranks."""
    rows = []
    for ranks in counts:
        found = {variant: cost(net, machine, ranks, variant, schedule) for variant in VARIANTS}
        rows.append(
            {
                "ranks": ranks,
                "plain ms": 1e3 * found["all"].plain,
                **{f"{variant} ms": 1e3 * found[variant].step for variant in VARIANTS},
                **{f"{variant} / plain": found[variant].step / found["all"].plain for variant in VARIANTS},
                "share of factor work": found["every"].share,
                "even share": 1.0 / ranks,
                "owner's memory GB": found["owner"].memory / 1e9,
            }
        )
    said = f"{net.name}, {net.batch:,} examples or tokens, {machine.name}, a refresh every {schedule.every} steps"
    report.table(f"ranks: {said}", rows)
    parts = ("gradient", "exposed", "statistics", "moments", "refresh", "inverses", "solve", "directions")
    most = counts[-1]
    split = {variant: cost(net, machine, most, variant, schedule) for variant in VARIANTS}
    report.table(
        f"where the time goes on {most} ranks, ms a mean step",
        [{"": part, **{v: 1e3 * getattr(split[v], part) for v in VARIANTS}} for part in parts]
        + [{"": "slowest step, nothing spread", **{v: 1e3 * split[v].slowest for v in VARIANTS}}],
    )
    report.table(
        f"what is sent and kept on {most} ranks",
        [
            {"": "MB handed over, ordinary step", **{v: split[v].ordinary / 1e6 for v in VARIANTS}},
            {"": "MB more, step with a refresh", **{v: split[v].due / 1e6 for v in VARIANTS}},
            {"": "GB of averages and inverses", **{v: split[v].memory / 1e9 for v in VARIANTS}},
        ],
    )


def main(arguments: list[str]) -> int:
    """Print the model's tables, draw them, and with ``--measure`` the points measured here beside them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ranks", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS_BY_NAME), default="gpt-1.3b")
    parser.add_argument("--every", type=int, default=10, help="steps from one refresh to the next")
    parser.add_argument("--share", type=float, default=1.0, help="share of the mini-batch in the statistics")
    parser.add_argument(
        "--work", type=float, default=11.0, help="operations of a factorisation over d^3; 1 for Cholesky"
    )
    for name in ("rate", "products", "factorisations", "near", "far", "node", "latency"):
        parser.add_argument(
            f"--{name}", type=float, default=getattr(ASSUMED, name), help="see benchmarks/ranks/model.py"
        )
    parser.add_argument("--measure", type=int, metavar="N", help="also measure the MNIST net on 1 to N processes here")
    parser.add_argument("--speedup", action="store_true", help="two processes against one, wall time; nothing else")
    parser.add_argument("--batch", type=int, help="of what is measured: 500, of --speedup 4000")
    parser.add_argument("--turns", type=int, default=5, help="turns of --speedup, of 20 steps each")
    parser.add_argument("--quick", action="store_true", help="measure a small net, in seconds")
    parser.add_argument("--plot", type=Path, help="write the picture")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    given = {key: getattr(options, key) for key in ("rate", "products", "factorisations", "near", "far", "latency")}
    machine = Machine(name=ASSUMED.name, node=int(options.node), **given)
    schedule = Schedule(options.every, options.share, options.work)
    net = NETS_BY_NAME[options.net]
    report = Report("ranks")
    widths = _SMALL if options.quick else NETS["mnist"]
    if options.speedup:
        cycle, batch = (5, 64) if options.quick else (CYCLE, 4000)
        compare(report, widths, options.batch or batch, options.turns, cycle)
        report.save(options.json)
        return 0
    tables(report, net, machine, schedule, COUNTS)
    if options.plot is not None:
        from benchmarks.ranks.picture import draw

        draw(net, machine, schedule, COUNTS, options.plot)
    if options.measure:
        _measured(report, widths, options.measure, options.batch or (64 if options.quick else 500))
    report.save(options.json)
    return 0


def _measured(report: Report, widths: Sequence[int], most: int, batch: int) -> None:
    """A chain on 1 to ``most`` processes, beside the model of it."""
    net, found = chain("chain", widths, batch), {}
    for ranks in range(1, most + 1):
        print(f"measuring {ranks} process(es) ...", flush=True)
        found[ranks] = measure(widths, batch, ranks)
    near, latency = link(4 * net.size)
    schedule = Schedule(every=10, share=0.125, work=1.0)
    machine = fitted(net, found[1][0], near, latency, schedule)
    cores = len(os.sched_getaffinity(0))
    title = f"measured: {'-'.join(map(str, widths))}, batch {batch}, gloo, one thread a process, {cores} cores"
    table(report, title, net, found, machine, schedule, cores)
