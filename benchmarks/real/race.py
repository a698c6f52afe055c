"""One run in a budget of processor seconds, and the choice of learning rate and mini-batch that comes before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.loops import loss_of
from benchmarks.real.methods import RATES, start
from benchmarks.real.tasks import MODELS, build
from benchmarks.robust.contenders import warm_up
from benchmarks.robust.race import batches_of
from benchmarks.robust.task import Task
from kfacore.parallel.cores import torch_threads

__all__ = ["Record", "Run", "choose", "final", "race"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        model: Name of the model.
        method: Name of the method.
        batch: Cases of a mini-batch.
        rate: Largest learning rate; None for K-FAC.
        seconds: Processor seconds of the steps; evaluations cost nothing.
        seed: Of the model and of the order of the data.
        places: Evaluations, besides the one before the first step.
    """

    model: str
    method: str
    batch: int
    rate: float | None
    seconds: float
    seed: int
    places: int = 12


def race(run: Run, data: Path) -> Record:
    """Run it on one thread.

    Returns:
        What was run, and ``curve``: rows of steps, seconds, mean loss of the mini-batches since the row before, and
        loss on held-out data; ``steps``, ``undone``, and ``error``, None if there was none.
    """
    with torch_threads(1):
        warm_up("kfac:blockdiag" if run.rate is None else "adam:0.001")
        torch.manual_seed(run.seed)
        task = build(run.model, data, run.batch, run.seed)
        method = start(run.method, task.model, run.rate)
        batches = batches_of(task, run.seed)
        curve: list[list[float | None]] = [[0, 0.0, None, _held(task)]]
        losses: list[float] = []
        seconds, steps, undone, error = 0.0, 0, 0, None
        while seconds < run.seconds:
            x, y = next(batches)
            began = time.process_time()
            try:
                method.schedule(seconds / run.seconds)
                stepped = method.step(x, y)
            except Exception as problem:  # the run has failed, whatever it is, and the others go on
                error = f"{type(problem).__name__}: {problem}"
                break
            seconds += time.process_time() - began
            steps += 1
            undone += not stepped.accepted
            losses.append(stepped.loss)
            if seconds >= run.seconds * len(curve) / run.places:
                curve.append([steps, seconds, mean(losses), _held(task)])
                losses = []
    return {**asdict(run), "steps": steps, "undone": undone, "error": error, "curve": curve}


def _held(task: Task) -> float:
    """Mean loss on the held-out data, with the model in evaluation mode."""
    task.model.eval()
    with torch.no_grad():
        parts = list(zip(task.x_test.split(64), task.y_test.split(64), strict=True))
        total = sum(float(loss_of(task.model(x), y)) * y.numel() for x, y in parts)
    task.model.train()
    return total / task.y_test.numel()


def final(record: Record) -> float:
    """Loss on held-out data at the end; infinite for a run that failed or ended without a number."""
    loss = record["curve"][-1][3]
    return float("inf") if record["error"] or loss is None or loss != loss else float(loss)


def choose(model: str, method: str, seconds: float, done: Callable[[Run], Record]) -> tuple[int, float | None]:
    """The mini-batch and learning rate of a method: rates first, with the first mini-batch, then mini-batches.

    The guest is given AdamW's rate, as somebody would who puts it around what he has tuned.

    Args:
        model: Name of the model.
        method: Name of the method.
        seconds: Of each run.
        done: Runs, or remembers.
    """
    first, *others = MODELS[model].batches
    rates: tuple[float | None, ...] = RATES[method] or (None,)
    if method == "guest":
        rates = (choose(model, "adamw", seconds, done)[1],)
    runs = [done(Run(model, method, first, rate, seconds, 0, places=1)) for rate in rates]
    rate = min(runs, key=final)["rate"]
    runs = [run for run in runs if run["rate"] == rate]
    runs += [done(Run(model, method, batch, rate, seconds, 0, places=1)) for batch in others]
    return min(runs, key=final)["batch"], rate
