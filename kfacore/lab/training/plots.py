"""Pictures of a run: loss and error, the trace of the optimizer's own numbers, originals above reconstructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfacore.lab.training.figures import clip_view, mark_edge, new_figure, number, save_figure, tidy
from kfacore.lab.training.files import disk_errors
from kfacore.roles import Likelihood, Problem, Split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kfacore.lab.training.run import RunFolder
    from kfacore.lab.training.setup import Parts

__all__ = ["ERROR_NAMES", "draw_progress", "draw_reconstructions", "draw_run", "draw_trace"]

ERROR_NAMES = {
    "autoencoder": "squared reconstruction error",
    "classifier": "share misclassified",
    "regression": "squared error",
}
"""What the error of a problem's task is called in pictures and tables."""

TRAIN, TEST, BATCH, WORSE = "#1b6ca8", "#d1661f", "#b9c4cc", "#c23b5a"

_TRACES = (
    ("lam", r"$\lambda$", True),
    ("gamma", r"$\gamma$", True),
    ("rho", r"$\rho$", False),
    ("alpha", r"$\alpha$", True),
    ("mu", r"$\mu$", False),
    ("batch_size", "examples in a mini-batch", True),
)

_IMAGES = 12


def draw_run(folder: RunFolder, events: Sequence[Mapping[str, Any]], parts: Parts) -> tuple[Path, ...]:
    """Draw everything there is to see of a run.

    Args:
        folder: The run folder.
        events: Its events.
        parts: Its problem, model and data.

    Returns:
        The files, in the order in which people should look at them.

    Raises:
        ResourceError: The disk refused.
    """
    with disk_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    title = _title(folder.path.resolve().name, events)
    drawn = []
    progress = draw_progress(events, title, ERROR_NAMES[parts.problem.task])
    if progress is not None:
        drawn.append(save_figure(progress, folder.plots / "progress.png"))
    trace = draw_trace(events, title)
    if trace is not None:
        drawn.append(save_figure(trace, folder.plots / "trace.png"))
    if parts.problem.task == "autoencoder" and parts.problem.image_shape is not None:
        average = _better_average(events, parts)
        figure = draw_reconstructions(
            parts.problem,
            parts.model if average is None else average,
            parts.likelihood,
            parts.train if parts.test is None else parts.test,
            f"{title}: {'training' if parts.test is None else 'test'} examples above their reconstructions"
            + ("" if average is None else " (averaged parameters)"),
        )
        drawn.append(save_figure(figure, folder.plots / "reconstructions.png"))
    return tuple(drawn)


def _better_average(events: Sequence[Mapping[str, Any]], parts: Parts) -> nn.Module | None:
    """The averaged model if the last evaluation found its error smaller, which a young average's is not."""
    last: Mapping[str, Any] = next((event for event in reversed(events) if event.get("event") == "eval"), {})
    current, averaged = number(last.get("train_error")), number(last.get("averaged_train_error"))
    if parts.average is None or current is None or averaged is None or averaged > current:
        return None
    return parts.average.model


def draw_progress(events: Iterable[Mapping[str, Any]], title: str, error_name: str) -> Figure | None:
    """Loss and error against steps and against training seconds, with a mark at every step that was undone.

    Args:
        events: Events of a run.
        title: Name of the run.
        error_name: What the error is called.

    Returns:
        The figure, or None if nothing was measured.
    """
    steps = _of(events, "step")
    evals = _of(events, "eval")
    if not steps and not evals:
        return None
    figure = new_figure(11.0, 7.5)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (name, label) in enumerate((("loss", "loss per example"), ("error", error_name))):
        for column, (x, x_label) in enumerate((("step", "step"), ("seconds", "training seconds"))):
            ax = axes[row, column]
            _line(ax, steps, x, name, color=BATCH, linewidth=1.0, label="mini-batch")
            undone = {"color": WORSE, "linestyle": "none", "marker": "x", "markersize": 7.0, "zorder": 5}
            _line(ax, [e for e in steps if e.get("rejected")], x, name, label="undone step", **undone)
            # The two sets often lie on each other: a wide line below a narrow one keeps both visible.
            wide: dict[str, Any] = {"color": TRAIN, "marker": "o", "markersize": 5.0, "linewidth": 2.6}
            thin: dict[str, Any] = {"color": TEST, "marker": "o", "markersize": 2.5, "linewidth": 1.1}
            _line(ax, evals, x, f"train_{name}", label="training set", **wide)
            _line(ax, evals, x, f"test_{name}", label="test set", **thin)
            _line(ax, evals, x, f"averaged_train_{name}", label="training set, averaged", linestyle="--", **wide)
            _line(ax, evals, x, f"averaged_test_{name}", label="test set, averaged", linestyle="--", **thin)
            tidy(ax, log=True)
            if row == 1:
                ax.set_xlabel(x_label)
            if column == 0:
                ax.set_ylabel(label)
    figure.suptitle(title)
    _legend(figure, axes[0, 0])
    return figure


def draw_trace(events: Iterable[Mapping[str, Any]], title: str) -> Figure | None:
    """lambda, gamma, rho, alpha, mu and the batch size against steps, as far as the optimizer has them.

    A panel shows where nearly all values lie; the few beyond it are marked on its edge, where the farthest is written.
    Steps at which the objective went up (rho is -inf) are marked too.

    Args:
        events: Events of a run.
        title: Name of the run.

    Returns:
        The figure, or None if there are no steps.
    """
    steps = _of(events, "step")
    present = [
        trace
        for trace in _TRACES
        if any(number(e.get(trace[0])) is not None or (trace[0] == "rho" and e.get("increased")) for e in steps)
    ]
    if not present:
        return None
    columns = min(len(present), 3)
    rows = math.ceil(len(present) / columns)
    figure = new_figure(3.8 * columns, 2.7 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for position, ax in enumerate(axes.flat):
        if position >= len(present):
            ax.set_axis_off()
            continue
        name, label, log = present[position]
        points = {"marker": ".", "markersize": 4.0} if name == "rho" else {}
        _line(ax, steps, "step", name, color=TRAIN, linewidth=1.2, **points)
        tidy(ax, log=log)
        _mark_exceptions(ax)
        if name == "rho":
            for level in (0.25, 0.75):  # where Levenberg-Marquardt changes lambda
                ax.axhline(level, color=BATCH, linewidth=0.9, linestyle=":")
            worse = [float(event["step"]) for event in steps if event.get("increased")]
            mark_edge(ax, worse, top=False, color=WORSE, label=r"$-\infty$: the objective went up")
            if worse:
                ax.legend(loc="best", fontsize=8, frameon=False)
        ax.set_title(label, fontsize=11)
        if position + columns >= len(present):
            ax.set_xlabel("step")
    figure.suptitle(title)
    return figure


@torch.no_grad()
def draw_reconstructions(
    problem: Problem, model: nn.Module, likelihood: Likelihood, split: Split, title: str, count: int = _IMAGES
) -> Figure:
    """Originals in the upper row, reconstructions E[y | z] in the lower one.

    Args:
        problem: Knows the shape of an image and how to display values.
        model: The autoencoder.
        likelihood: Gives the predictive mean.
        split: Where the cases are taken from, evenly spread.
        title: Title of the picture.
        count: How many cases.

    Returns:
        The figure.
    """
    count = min(count, len(split))
    chosen = torch.linspace(0, len(split) - 1, count).round().long().to(split.inputs.device)
    originals = split.inputs.index_select(0, chosen)
    training = model.training
    model.eval()
    try:
        means = likelihood.mean(model(originals))
    finally:
        model.train(training)
    figure = new_figure(max(0.95 * count, 4.0), 2.5)
    axes = figure.subplots(2, count, squeeze=False)
    for row, values in enumerate((originals, means)):
        images = _images(problem, values)
        for column in range(count):
            ax = axes[row, column]
            ax.imshow(images[column].numpy(), cmap="gray", vmin=0.0, vmax=1.0)
            ax.set_xticks([])
            ax.set_yticks([])
    axes[0, 0].set_ylabel("original", fontsize=9)
    axes[1, 0].set_ylabel("reconstruction", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _mark_exceptions(ax: Axes) -> None:
    """Keep a few far values from flattening the rest: mark them on the edge, with the value of the farthest."""
    above, below = clip_view(ax, log=ax.get_yscale() == "log")
    for beyond, top in ((above, True), (below, False)):
        if not beyond:
            continue
        mark_edge(ax, [x for x, _ in beyond], top=top, color=TEST)
        x, y = (max if top else min)(beyond, key=lambda point: point[1])
        ax.annotate(
            f"{y:.3g}",
            (x, 1.0 if top else 0.0),
            xycoords=ax.get_xaxis_transform(),
            xytext=(6.0, -3.0 if top else 3.0),
            textcoords="offset points",
            va="top" if top else "bottom",
            fontsize=8,
            color=TEST,
        )


def _title(run: str, events: Iterable[Mapping[str, Any]]) -> str:
    """The run's folder, and what it is a run of, for pictures that have left their folder."""
    start: Mapping[str, Any] = next((event for event in events if event.get("event") == "start"), {})
    if "problem" not in start:
        return run
    method = start["optimizer"] if start.get("approx") is None else f"{start['optimizer']}/{start['approx']}"
    return f"{run}: {start['problem']}, {method}, seed {start['seed']}"


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3.5)


def _of(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event.get("event") == kind]


def _line(ax: Axes, events: Iterable[Mapping[str, Any]], x: str, y: str, **style: Any) -> None:
    """Plot the events that have both numbers; nothing at all if none has."""
    points = [(a, b) for a, b in ((number(e.get(x)), number(e.get(y))) for e in events) if None not in (a, b)]
    if points:
        ax.plot([a for a, _ in points], [b for _, b in points], **style)  # type: ignore[arg-type]  # no None is left


def _images(problem: Problem, values: Tensor) -> Tensor:
    picture: Callable[[Tensor], Tensor] = problem.picture
    shape = problem.image_shape
    if shape is None:
        raise ValueError("the problem has no image_shape")
    return picture(values).detach().to("cpu", torch.float32).clamp(0.0, 1.0).reshape(-1, *shape)
