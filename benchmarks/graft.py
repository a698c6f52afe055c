"""Whether a guest pays: steps and processor seconds to the final validation loss of the tuned optimizer that it wraps.

The base trains with its best learning rate and a schedule; then the same with ``scale="graft"`` around it, rate and
schedule kept as they are. The loss on held-out data is taken at twenty places of the schedule, and the first at which
it is down to the base's last counts. Processor seconds are those of this process in training, evaluations left out.
``--tune`` first runs the base alone at every rate of its list, with seed 0, and goes on with the best.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import loops
from benchmarks.loops import Loop, run_pass
from benchmarks.report import Report
from kfacore import Preconditioned

__all__ = ["Curve", "main", "measure", "train", "tune"]

_PLACES = 20
"""Evaluations in a run."""


@dataclass(frozen=True)
class Curve:
    """What a run came to.

    Attributes:
        steps: Steps at each evaluation.
        seconds: Processor seconds of training by then.
        losses: On held-out data.
    """

    steps: list[int]
    seconds: list[float]
    losses: list[float]

    def reached(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds at the first evaluation with at most this loss, None if there is none."""
        rows = zip(self.steps, self.seconds, self.losses, strict=True)
        return next(((steps, seconds) for steps, seconds, own in rows if own <= loss), None)


def train(loop: Loop, seed: int, rate: float, guest: dict[str, Any] | None) -> Curve:
    """One run.

    Args:
        loop: What is trained.
        seed: Of the model and the order of the data.
        rate: Largest learning rate.
        guest: Options of `kfacore.Preconditioned`; None trains with the base alone.
    """
    model = loop.build(seed)
    optimizer = loop.optimizer(model.parameters(), rate)
    if guest is not None:
        optimizer = Preconditioned(model, optimizer, likelihood="categorical", **guest)
    schedule, generator = loop.schedule(optimizer, rate), torch.Generator().manual_seed(1000 + seed)
    places = {max(1, round(loop.steps * (k + 1) / _PLACES)) for k in range(_PLACES)}
    curve, seconds = Curve([], [], []), 0.0
    for step in range(1, loop.steps + 1):
        start = time.process_time()
        run_pass(model, optimizer, *loop.batch(generator))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.process_time() - start
        if step in places:
            curve.steps.append(step)
            curve.seconds.append(seconds)
            curve.losses.append(loop.held_loss(model))
    return curve


def tune(report: Report, loop: Loop) -> float:
    """Train the base at every rate of its list with seed 0, and add a table.

    Returns:
        The rate with the lowest final loss.
    """
    finals = {rate: train(loop, 0, rate, None).losses[-1] for rate in loop.rates}
    best = min(finals, key=lambda rate: finals[rate])
    rows = [
        {"learning rate": rate, "final loss": loss, "": "best" if rate == best else ""} for rate, loss in finals.items()
    ]
    report.table(f"graft: {loop.name}, {loop.steps} steps, the base alone", rows)
    return best


def measure(report: Report, loop: Loop, rate: float, seeds: Sequence[int], guest: dict[str, Any]) -> None:
    """Run base and guest for every seed, and add a table of all and one of the means."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        base, own = train(loop, seed, rate, None), train(loop, seed, rate, guest)
        at = own.reached(base.losses[-1])
        rows.append(
            {
                "seed": seed,
                "base's final loss": base.losses[-1],
                "guest's": own.losses[-1],
                "base's seconds": base.seconds[-1],
                "guest's, all": own.seconds[-1],
                "steps to base's loss": None if at is None else at[0],
                "share of steps": None if at is None else at[0] / loop.steps,
                "share of seconds": None if at is None else at[1] / base.seconds[-1],
                "base's curve": base.losses,
                "guest's curve": own.losses,
            }
        )
        shown = [{key: value for key, value in row.items() if "curve" not in key} for row in rows[-1:]]
        report.table(f"graft: {loop.name}, {loop.steps} steps, rate {rate:g}, seed {seed}", shown)
        report.tables[-1]["rows"] = rows[-1:]
    names = ("base's final loss", "guest's", "share of steps", "share of seconds")
    known = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    means = {name: mean(values) if values else None for name, values in known.items()}
    title = f"graft: {loop.name}, means; shares are of the seeds that reached the base's loss"
    report.table(title, [{"reached": f"{len(known['share of steps'])} of {len(rows)}", **means}])


def main(arguments: list[str]) -> int:
    """Print one table a seed and one of the means, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks graft", description=__doc__)
    parser.add_argument("--text", type=Path, help="text file of the GPT; words made up if left out")
    parser.add_argument("--images", type=Path, help=".npz of the CNN; noise made up if left out")
    parser.add_argument("--net", choices=["gpt", "cnn"], action="append", help="repeatable; both if left out")
    parser.add_argument("--seeds", type=int, default=3, help="0 with --tune: to tune alone")
    parser.add_argument("--steps", type=int, help="of a run; the task's if left out")
    parser.add_argument("--batch", type=int, help="pieces or images of a step; the task's if left out")
    parser.add_argument("--rate", type=float, help="largest learning rate; the task's tuned one if left out")
    parser.add_argument("--tune", action="store_true", help="find the base's best rate first")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the guest, repeatable")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    guest = {name: json.loads(value) for name, _, value in (option.partition("=") for option in given.option)}
    report = Report("graft", guest=guest)
    size = {} if given.batch is None else {"batch": given.batch}
    for net in given.net or ["gpt", "cnn"]:
        loop = loops.gpt(given.text, **size) if net == "gpt" else loops.cnn(given.images, **size)
        loop = loop.with_steps(given.steps)
        rate = tune(report, loop) if given.tune else given.rate or loop.rate
        if given.seeds:
            measure(report, loop, rate, range(given.seeds), guest)
    report.save(given.json)
    return 0
