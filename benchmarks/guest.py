"""What a guest costs: a step of `kfacore.Preconditioned` against its base optimizer's own, interleaved in one process.

An ordinary step has no statistics due. Steps of ``every`` are means over whole periods, so that statistics and refresh
are in them in their proportion. The ratios are of whole training steps, forward and backward pass included; operations
and waits of the host, beyond those of the base, are of the pass and the optimizer's step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import loops
from benchmarks.interleave import interleave
from benchmarks.launches import Launches
from benchmarks.loops import Loop, run_pass
from benchmarks.report import Report
from kfacore import Preconditioned
from kfacore.parallel.cores import torch_threads

__all__ = ["Trained", "count", "main", "measure"]

_NEVER = 10**9


class Trained:
    """A model in training, alone or with a guest; one call is one step."""

    def __init__(self, loop: Loop, **options: Any) -> None:
        self.loop, self.model = loop, loop.build(0)
        self.optimizer = loop.optimizer(self.model.parameters(), loop.rate)
        if options:
            self.optimizer = Preconditioned(self.model, self.optimizer, likelihood="categorical", **options)
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, turn: int) -> None:
        """The turn does not matter."""
        run_pass(self.model, self.optimizer, *self.loop.batch(self._generator))
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(report: Report, loop: Loop, *, every: int, periods: int, options: dict[str, Any]) -> None:
    """Time base, ordinary and average steps, and add a table."""
    contenders = {
        "base": Trained(loop),
        "ordinary": Trained(loop, **{**options, "every": _NEVER}),
        f"every {every}": Trained(loop, **{**options, "every": every}),
    }
    # The first three steps have statistics, and warm-up ends on a multiple of the period.
    timings = interleave(contenders, every * periods, warmup=max(5, -(-5 // every) * every))
    base = timings["base"]
    rows = []
    for name, timing in timings.items():
        ratios = [own / other for own, other in zip(timing.seconds, base.seconds, strict=True)]
        rows.append(
            {
                "": name,
                "mean ms": 1e3 * timing.mean,
                "median ms": 1e3 * timing.median,
                "slowest ms": 1e3 * timing.slowest,
                "mean / base": timing.mean / base.mean,
                "median / base": timing.median / base.median,
                "median of ratios": median(ratios),
            }
        )
    report.table(f"guest: {loop.name}, {every * periods} steps, {torch.get_num_threads()} threads", rows)


def count(report: Report, loop: Loop, *, options: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Add a table of operations and waits.

    Returns:
        Operations and waits of each kind of step.
    """
    found = {"base": _counted(Trained(loop), 4)}
    found["ordinary"] = _counted(Trained(loop, **{**options, "every": 10}), 4)
    found["statistics and refresh"] = _counted(Trained(loop, **{**options, "every": 10}), 10)
    base = found["base"]
    rows = [
        {"": name, "operations": operations, "beyond base": operations - base[0], "waits beyond base": waits - base[1]}
        for name, (operations, waits) in found.items()
    ]
    report.table(f"guest: {loop.name}, operations of a training step", rows)
    return found


def _counted(trained: Trained, step: int) -> tuple[int, int]:
    """Operations and waits of that step, the first being 1."""
    for turn in range(1, step):
        trained(turn)
    with torch_threads(1), Launches() as launches:  # a dispatch mode sees its own thread only
        trained(step)
    return sum(launches.operations.values()), launches.waits


def main(arguments: list[str]) -> int:
    """Print the ratios, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks guest", description=__doc__)
    parser.add_argument("--text", type=Path, help="text file of the GPT; words made up if left out")
    parser.add_argument("--images", type=Path, help=".npz of the CNN; noise made up if left out")
    parser.add_argument("--net", choices=["gpt", "cnn"], action="append", help="repeatable; gpt if left out")
    parser.add_argument("--batch", type=int, default=32, help="pieces or images of a step")
    parser.add_argument("--context", type=int, default=128, help="tokens of a piece")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--periods", type=int, default=3, help="counted steps, in periods of EVERY")
    parser.add_argument("--scale", choices=["graft", "kl", "none"], default="graft")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    report = Report("guest")
    for net in given.net or ["gpt"]:
        if net == "gpt":
            build = loops.gpt(given.text, batch=given.batch, context=given.context)
        else:
            build = loops.cnn(given.images, batch=given.batch)
        options = {"scale": given.scale}
        count(report, build, options=options)
        measure(report, build, every=given.every, periods=given.periods, options=options)
    report.save(given.json)
    return 0
