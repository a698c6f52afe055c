"""The runs of a study as arrays: curves, traces, ends, and when a target was reached. Imports no torch.

A report must not fail because one run did: whatever is missing or damaged in a run folder becomes a state and a reason
of that run, which the report shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kfacore.errors import DataError
from kfacore.lab.studies.machine import Presence
from kfacore.lab.studies.plan import PlannedRun, Study
from kfacore.lab.training.files import read_events
from kfacore.lab.training.outcome import Losses
from kfacore.lab.training.run import RunFolder

__all__ = ["AXES", "MEASURES", "TRACES", "RunData", "read_runs"]

MEASURES = tuple(
    f"{prefix}{part}_{name}" for name in ("error", "loss") for prefix in ("", "averaged_") for part in ("train", "test")
)
"""Keys of the evaluation events that a report looks at."""

AXES = ("step", "cases", "seconds")
"""What progress is measured against: steps, training cases processed, training seconds."""

TRACES = ("lam", "gamma", "rho", "alpha", "mu", "batch_size")
"""The optimizer's own numbers, keys of the step events."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RunData:
    """One run with everything a report needs of it.

    Attributes:
        planned: The run in the study.
        state: Its state; ``"failed"`` also where the study says done and the folder cannot be read, ``"diverged"``
            where its losses say so.
        reason: Why it failed or diverged.
        steps: Columns of the step events: `AXES`, ``loss`` and `TRACES`; NaN where an event has no number.
        evals: Columns of the evaluations: `AXES` and `MEASURES`.
        config: The resolved configuration; empty if the run has not begun.
        manifest: Versions, device, threads; empty if the run has not begun.
        shared: Whether its wall times were taken while other runs of the study used the machine.
    """

    planned: PlannedRun
    state: str
    reason: str
    steps: Columns = field(repr=False)
    evals: Columns = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shared: bool = False

    @property
    def seed(self) -> int:
        """The seed."""
        return self.planned.seed

    @property
    def done(self) -> bool:
        """Whether the run came to its end; only then its last value is its final one."""
        return self.state == "done"

    def values(self, measure: str) -> np.ndarray:
        """A measure at each evaluation.

        A run reports its averaged parameters once it has them. Before that, and in a run without averaging, the current
        ones are all it could report, so an ``averaged_`` measure falls back to the plain one.
        """
        values = self.evals[measure]
        if measure.startswith("averaged_"):
            values = np.where(np.isnan(values), self.evals[measure.removeprefix("averaged_")], values)
        return values

    def final(self, measure: str) -> float | None:
        """The last value of a run that is done; None for all others."""
        return self.latest(measure) if self.done else None

    def best(self, measure: str) -> float | None:
        """The smallest value of a run that is done; None for all others, whose evaluations are not all there."""
        return self.smallest(measure) if self.done else None

    def latest(self, measure: str) -> float | None:
        """The last finite value, however the run ended."""
        found = _finite(self.values(measure))
        return float(found[-1]) if found.size else None

    def smallest(self, measure: str) -> float | None:
        """The smallest finite value, however the run ended."""
        found = _finite(self.values(measure))
        return float(found.min()) if found.size else None

    def reached(self, measure: str, target: float, axis: str) -> float | None:
        """Where on an axis the first evaluation at or below the target lies; None if there is none."""
        hits = np.flatnonzero(self.values(measure) <= target)  # false for NaN
        return float(self.evals[axis][hits[0]]) if hits.size else None

    def spent(self, axis: str) -> float:
        """Up to where a run is known not to have reached something that it has not reached.

        Infinity for a run that is done or has diverged: within the study's budget it never will, and where its budget
        ended on this axis must not make it look better than a slower one. The others could still have come there.
        """
        if self.state in ("done", "diverged"):
            return math.inf
        return self.last(axis)

    def last(self, axis: str) -> float:
        """Where the run's last event lies on an axis; 0 if there is none."""
        return max((float(part[axis].max()) for part in (self.steps, self.evals) if part[axis].size), default=0.0)


def read_runs(study: Study) -> tuple[RunData, ...]:
    """Read every run of a study, each folder once.

    Args:
        study: The study, with the states of its runs.

    Returns:
        The runs in the order of the study.
    """
    known: dict[str, RunData] = {}
    for planned in study.runs:
        if planned.hash not in known:
            known[planned.hash] = _read(study, planned)
    # Two variants may be the same run, which then stands in both under its own name.
    return tuple(replace(known[planned.hash], planned=planned) for planned in study.runs)


def _read(study: Study, planned: PlannedRun) -> RunData:
    folder = RunFolder(planned.path)
    state, reason = str(planned.state), planned.reason
    config: Mapping[str, Any] = {}
    manifest: Mapping[str, Any] = {}
    steps: Sequence[Mapping[str, Any]] = ()
    evals: Sequence[Mapping[str, Any]] = ()
    try:
        config = folder.read_config()
        manifest = folder.read_manifest()
        steps, evals = _events(folder.metrics_file)
        if state == "done" and not evals:
            raise DataError(f"{folder.metrics_file} holds no evaluation; switch the jsonl sink on and run it again")
        losses = Losses.of(evals)
        if state == "done" and losses.verdict == "diverged":  # by a version that did not look
            state, reason = "diverged", f"it got worse: training loss {losses}"
    except DataError as error:
        if state == "done":
            state, reason = "failed", str(error)
        elif folder.metrics_file.exists() and not reason:
            reason = str(error)
    return RunData(
        planned, state, reason, *_columns(steps, evals), config, manifest, Presence(study.folder, planned.hash).shared
    )


def _events(file: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The step and the evaluation events of a run."""
    steps: list[Mapping[str, Any]] = []
    evals: list[Mapping[str, Any]] = []
    try:
        for _, event in read_events(file):
            kind = event.get("event")
            if kind == "step":
                steps.append(event)
            elif kind == "eval":
                evals.append(event)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}; delete the run's folder and run the study again") from error
    return steps, evals


def _columns(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> tuple[Columns, Columns]:
    taken = {name: _column(steps, name) for name in ("step", "seconds", "loss", *TRACES)}
    taken["cases"] = np.cumsum(np.nan_to_num(taken["batch_size"]))
    measured = {name: _column(evals, name) for name in ("step", "seconds", *MEASURES)}
    # Cases before an evaluation: those of all steps up to it.
    position = np.searchsorted(taken["step"], measured["step"], side="right")
    measured["cases"] = np.concatenate([[0.0], taken["cases"]])[position]
    return taken, measured


def _column(events: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A number of each event, NaN where it has none; `None` is what numpy makes NaN of."""
    try:
        return np.array([event.get(name) for event in events], dtype=np.float64)
    except (TypeError, ValueError):  # something that is no number: rare, so looked at one by one only then
        values = [event.get(name) for event in events]
        return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=np.float64)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.extract(np.isfinite(values), values)
