"""Comparisons of runs: one row a run, and one set of pictures. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import ConfigError, DataError, nearest
from kfacore.lab.training.figures import new_figure, number, save_figure, tidy
from kfacore.lab.training.files import disk_errors, require_folder
from kfacore.lab.training.outcome import Losses
from kfacore.lab.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "RunSummary", "compare", "draw_comparison", "summarise"]

MEASURES = ("train_error", "test_error", "averaged_train_error", "averaged_test_error")
"""The errors that a table compares, keys of the evaluation events."""

_COLORS = ("#1b6ca8", "#d1661f", "#2e8b57", "#8a4fbe", "#b8860b", "#c23b5a", "#3a9ea5", "#6b6b6b")


@dataclass(frozen=True)
class RunSummary:
    """One run in a comparison.

    Attributes:
        run: The folder's name.
        path: The folder.
        problem: Name of the problem.
        optimizer: Name of the optimizer.
        approx: Name of the approximation, or None.
        seed: The seed.
        state: ``"done"``; ``"diverged"`` where the losses say so; ``"stopped"`` where the last step has not been
            reached.
        steps: Steps taken.
        cases: Training cases processed, the sum of all mini-batches.
        seconds: Training seconds.
        final: The last evaluation of each of `MEASURES`, None where there is none.
        best: The smallest of each.
        reached_step: First evaluated step at which the measure asked for is at or below the target, or None.
        reached_seconds: Training seconds at that step.
        losses: First, best and last training loss, and the verdict on them.
        rejected: Steps that were undone.
    """

    run: str
    path: Path
    problem: str
    optimizer: str
    approx: str | None
    seed: int
    state: str
    steps: int
    cases: int
    seconds: float
    final: Mapping[str, float | None]
    best: Mapping[str, float | None]
    reached_step: int | None
    reached_seconds: float | None
    losses: Losses = field(default_factory=Losses)
    rejected: int = 0

    @property
    def method(self) -> str:
        """Optimizer and approximation, for example ``"kfac/tridiag"``."""
        return self.optimizer if self.approx is None else f"{self.optimizer}/{self.approx}"

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return {**asdict(self), "path": str(self.path), "verdict": self.losses.verdict}


def summarise(run: Path, *, target: float | None = None, measure: str = "train_error") -> RunSummary:
    """Read one run.

    Args:
        run: The run folder.
        target: An error to be reached, or None.
        measure: Which of `MEASURES` must reach it.

    Raises:
        ConfigError: The measure is unknown.
        DataError: The folder holds no run, it is damaged, or nothing has happened yet.
    """
    if measure not in MEASURES:
        raise ConfigError(f"unknown measure '{measure}'; {nearest(measure, MEASURES)}")
    folder = RunFolder(run)
    config = folder.read_config()
    events = folder.events()
    if not events:
        raise DataError(f"{run} holds no events: it has no steps yet, or its jsonl sink is switched off")
    steps = [event for event in events if event.get("event") == "step"]
    evals = [event for event in events if event.get("event") == "eval"]
    losses = Losses.of(evals)
    reached = next(
        (e for e in evals if target is not None and (value := number(e.get(measure))) is not None and value <= target),
        None,
    )
    values = {name: [n for event in evals if (n := number(event.get(name))) is not None] for name in MEASURES}
    return RunSummary(
        run=run.resolve().name,
        path=run,
        problem=_kind(config, "problem") or "?",
        optimizer=_kind(config, "optimizer") or "?",
        approx=_kind(config, "approx"),
        seed=int(config.get("seed", 0)),
        state=_state(events, losses),
        steps=int(events[-1]["step"]),
        cases=sum(int(event.get("batch_size", 0)) for event in steps),
        seconds=max((n for event in events if (n := number(event.get("seconds"))) is not None), default=0.0),
        final={name: found[-1] if found else None for name, found in values.items()},
        best={name: min(found) if found else None for name, found in values.items()},
        reached_step=None if reached is None else int(reached["step"]),
        reached_seconds=None if reached is None else number(reached.get("seconds")),
        losses=losses,
        rejected=sum(bool(event.get("rejected")) for event in steps),
    )


def _state(events: Sequence[Mapping[str, Any]], losses: Losses) -> str:
    """How a run has ended: by its losses, or in a numerical failure."""
    if losses.verdict == "diverged" or events[-1].get("event") == "diverged":
        return "diverged"
    return "done" if events[-1].get("event") == "done" else "stopped"


def compare(
    runs: Sequence[Path], *, target: float | None = None, measure: str = "train_error", out: Path | None = None
) -> tuple[list[RunSummary], tuple[Path, ...]]:
    """Compare runs in rows and pictures.

    Args:
        runs: The run folders.
        target: An error to be reached.
        measure: Which of `MEASURES` must reach it.
        out: Folder of the pictures; ``report`` beside the first run by default.

    Returns:
        One summary a run, in the order given, and the pictures.

    Raises:
        ConfigError: No run is given, or the measure is unknown.
        DataError: A folder holds no run, or it is damaged.
        ResourceError: The disk refused the pictures.
    """
    if not runs:
        raise ConfigError("name at least one run folder")
    rows = [summarise(run, target=target, measure=measure) for run in runs]
    folder = out if out is not None else runs[0].resolve().parent / "report"
    require_folder(folder, "name a folder for the pictures with --out")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    events = [RunFolder(run).events() for run in runs]
    labels = _labels(rows)
    plots = []
    for name, title in (("error", "error"), ("loss", "loss")):
        figure = draw_comparison(labels, events, name, title)
        plots.append(save_figure(figure, folder / f"{name}.png"))
    return rows, tuple(plots)


def draw_comparison(
    labels: Sequence[str], events: Sequence[Sequence[Mapping[str, Any]]], name: str, title: str
) -> Figure:
    """Training and test curves of several runs against steps and training seconds.

    Args:
        labels: What the runs are called in the legend.
        events: The events of each run.
        name: ``"error"`` or ``"loss"``.
        title: What the quantity is called on the axes.

    Returns:
        The figure: a row for training and one for test cases where there are any; averaged parameters are dashed.
    """
    from matplotlib.lines import Line2D

    parts = [part for part in ("train", "test") if _any(events, f"{part}_{name}")] or ["train"]
    figure = new_figure(11.0, 3.7 * len(parts) + 0.4 + 0.22 * len(labels))
    axes = figure.subplots(len(parts), 2, sharex="col", sharey="row", squeeze=False)
    for row, part in enumerate(parts):
        for column, (x, x_label) in enumerate((("step", "step"), ("seconds", "training seconds"))):
            ax = axes[row, column]
            for index, run in enumerate(events):
                color = _COLORS[index % len(_COLORS)]
                for prefix, line in (("", "-"), ("averaged_", "--")):
                    points = [
                        (number(event.get(x)), number(event.get(f"{prefix}{part}_{name}")))
                        for event in run
                        if event.get("event") == "eval"
                    ]
                    kept = [(a, b) for a, b in points if a is not None and b is not None]
                    if kept:
                        ax.plot(*zip(*kept, strict=True), color=color, linestyle=line, marker="o", markersize=3.0)
            if row == len(parts) - 1:
                ax.set_xlabel(x_label)
            if column == 0:
                ax.set_ylabel(f"{'training' if part == 'train' else 'test'} {title}")
    for ax in axes.flat:  # one scale for all: training and test rows are there to be compared
        tidy(ax, log=True, like=list(axes.flat))
    handles = [Line2D([], [], color=_COLORS[i % len(_COLORS)], label=label) for i, label in enumerate(labels)]
    if _any(events, f"averaged_train_{name}"):
        handles.append(Line2D([], [], color="#444444", linestyle="--", label="averaged parameters"))
    columns = 1 if max(len(label) for label in labels) > 40 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _labels(rows: Sequence[RunSummary]) -> list[str]:
    """Names short enough for a legend that still tell the runs apart."""
    short = [f"{row.problem}, {row.method}, seed {row.seed}" for row in rows]
    return [
        label if short.count(label) == 1 else f"{label} ({row.run})" for label, row in zip(short, rows, strict=True)
    ]


def _any(events: Sequence[Sequence[Mapping[str, Any]]], key: str) -> bool:
    return any(number(event.get(key)) is not None for run in events for event in run)


def _kind(config: Mapping[str, Any], slot: str) -> str | None:
    value = config.get(slot)
    return str(value.get("kind")) if isinstance(value, Mapping) else None
