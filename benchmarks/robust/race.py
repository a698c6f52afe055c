"""One run: a problem with a seed, an optimizer, and a budget in processor seconds or in steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.robust.contenders import Stepper, start, warm_up
from benchmarks.robust.problems import PROBLEMS
from benchmarks.robust.task import Task
from benchmarks.robust.verdict import Evaluation, judge
from kfacore.registry import get_registry

__all__ = ["Budget", "Record", "batches_of", "race"]

Record = dict[str, Any]
"""What is kept of a run; see `race`."""

EVALUATIONS = 25
GIVE_UP = 10
"""Mini-batch losses in a row that are not finite: nothing will come of it."""


@dataclass(frozen=True)
class Budget:
    """When a run ends, and when it is evaluated: at times that grow geometrically.

    Attributes:
        seconds: Processor seconds of the steps; evaluations cost nothing.
        steps: Number of steps, instead.
    """

    seconds: float | None = None
    steps: int | None = None

    def spent(self, seconds: float, steps: int) -> float:
        """The share that is used, 1 at the end."""
        if self.steps is not None:
            return steps / self.steps
        assert self.seconds is not None
        return seconds / self.seconds


@dataclass
class _Run:
    """A run under way."""

    task: Task
    budget: Budget
    cost: float | None = None
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    rejected: int = 0
    error: str | None = None

    def evaluate(self) -> None:
        likelihood = get_registry().build("likelihood", self.task.likelihood)
        with torch.no_grad():
            train, test = (
                float(likelihood.nll(self.task.model(x), y).mean(dtype=torch.float64))
                for x, y in ((self.task.x, self.task.y), (self.task.x_test, self.task.y_test))
            )
        self.evaluations.append(Evaluation(self.seconds, len(self.losses), train, test))

    def go(self, step: Stepper, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Step until the budget is spent or nothing can come of it any more."""
        self.evaluate()
        times = iter([200.0 ** (i / (EVALUATIONS - 1) - 1.0) for i in range(EVALUATIONS)])
        due = next(times)
        while (spent := self.budget.spent(self.seconds, len(self.losses))) < 1.0 and not self._hopeless():
            if spent >= due and self.losses:
                self.evaluate()
                while due <= spent:
                    due = next(times)
            x, y = next(batches)
            began = time.process_time()
            try:
                stepped = step(x, y)
            except Exception as error:  # whatever it is, the run has failed, and the other runs go on
                self.error = f"{type(error).__name__}: {error}"
                break
            self.seconds += time.process_time() - began if self.cost is None else self.cost
            self.losses.append(stepped.loss)
            self.rejected += not stepped.accepted
        self.evaluate()

    def _hopeless(self) -> bool:
        last = self.losses[-GIVE_UP:]
        return len(last) == GIVE_UP and not any(map(math.isfinite, last))


def race(problem: str, seed: int, contender: str, budget: Budget, cost: float | None = None) -> Record:
    """Run it on one thread.

    Args:
        problem: Name of a problem.
        seed: Of data, split, initialisation and the order of mini-batches; every contender gets the same.
        contender: Name of a contender.
        budget: When to end.
        cost: Processor seconds that a step counts for, known from runs on a quiet machine; measured if left out.

    Returns:
        A record without tensors: losses at the first, best and last evaluation, steps, the verdicts of
        `benchmarks.robust.verdict`, and ``diverged`` if any of them or an exception says so.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        warm_up(contender)
        task = PROBLEMS[problem].build(seed)
        run = _Run(task, budget, cost)
        run.go(start(contender, task.model, task.likelihood), batches_of(task, seed))
    finally:
        torch.set_num_threads(threads)
    return {"problem": problem, "kind": PROBLEMS[problem].kind, "seed": seed, "contender": contender, **_outcome(run)}


def batches_of(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches of equal size for ever, every epoch shuffled anew; what is left over is left out."""
    cases = len(task.x)
    size = min(task.batch, cases)
    order = torch.Generator().manual_seed(seed + 1)
    while True:
        for chosen in torch.randperm(cases, generator=order)[: cases // size * size].view(-1, size):
            yield task.x[chosen], task.y[chosen]


def _outcome(run: _Run) -> Record:
    finite = all(bool(parameter.isfinite().all()) for parameter in run.task.model.parameters())
    verdict = judge(run.losses, run.evaluations, finite_model=finite)
    first, last = run.evaluations[0], run.evaluations[-1]
    trains, tests = ([getattr(e, name) for e in run.evaluations] for name in ("train", "test"))
    return {
        "budget": asdict(run.budget),
        "steps": len(run.losses),
        "used": run.seconds,
        "paced": run.cost is not None,
        "rejected": run.rejected,
        "error": run.error,
        "diverged": verdict.nan or verdict.rose or verdict.doubled or run.error is not None,
        **asdict(verdict),
        "first": first.train,
        "best": min(filter(math.isfinite, trains), default=math.nan),
        "final": last.train,
        "first_test": first.test,
        "best_test": min(filter(math.isfinite, tests), default=math.nan),
        "final_test": last.test,
        "evaluations": [[e.seconds, e.step, e.train, e.test] for e in run.evaluations],
    }
