"""The pictures of a report: curves with bands, traces, differences, performance profiles. Imports no torch.

Every picture is drawn into one axes. `panel` makes a small picture of it for the page, which has one legend for all;
`strip` puts several side by side, with their legend, for a paper. Runs that diverged, failed or are not done are drawn
one by one, thin and dashed up to where they got; they are never part of a mean and never left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kfacore.lab.studies.pens import FAINT, INK, Pen, pens
from kfacore.lab.studies.report_data import RunData
from kfacore.lab.studies.report_results import Cell, Results
from kfacore.lab.studies.statistics import MIN_INTERVAL, t_quantile
from kfacore.lab.training.figures import tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AXIS_LABELS",
    "TRACE_LABELS",
    "Draw",
    "curves",
    "differences",
    "panel",
    "profile",
    "strip",
    "trace",
]

Draw = Callable[["Axes"], bool]
"""Draws one picture and says whether there was anything to draw."""

AXIS_LABELS = {"step": "step", "cases": "training examples", "seconds": "training seconds"}
TRACE_LABELS = {
    "lam": "lambda",
    "gamma": "gamma",
    "rho": "rho (reduction ratio)",
    "alpha": "alpha (learning rate)",
    "mu": "mu (momentum)",
    "batch_size": "examples in a mini-batch",
}
_LOG_TRACES = ("lam", "gamma", "alpha", "batch_size")

_POINTS = 160
"""Points of a line: more cannot be told apart at the size of a panel, and only make the file larger."""


def panel(draw: Draw, margin: float = 0.65) -> Figure | None:
    """One picture for the page, without a legend.

    Args:
        draw: The picture.
        margin: Room on its left, in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.9))
    ax = figure.add_axes(_place(4.4, 2.9, margin, 0.5, 4.4 - margin - 0.12, 2.25))
    return figure if draw(ax) else None


def _place(
    width: float, height: float, left: float, bottom: float, wide: float, high: float
) -> tuple[float, float, float, float]:
    """Axes in inches: placed by hand they line up, and laying figures out takes half the time of a report."""
    return left / width, bottom / height, wide / width, high / height


def strip(draws: Sequence[Draw], title: str, pens_of: Sequence[Pen], margin: float = 0.65) -> Figure | None:
    """Pictures side by side with a legend, for a paper; None if there is nothing in any of them.

    Args:
        draws: The pictures, at most three in a row.
        title: The title of them all.
        pens_of: The variants in the legend.
        margin: Room on the left of each, in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(draws))
    rows = math.ceil(len(draws) / columns)
    beside = min(len(pens_of), 4 if columns == 3 else 2) or 1
    low = 0.22 * math.ceil(len(pens_of) / beside) + 0.15
    wide, high = margin + 3.35, 2.95
    width = wide * columns
    lines = textwrap.wrap(title, int(12.5 * width))  # about as many characters fit into an inch
    height = high * rows + low + 0.1 + 0.2 * len(lines)
    figure = Figure(figsize=(width, height))
    drawn = False
    for position, draw in enumerate(draws):
        row, column = divmod(position, columns)
        bottom = low + high * (rows - 1 - row) + 0.5
        ax = figure.add_axes(_place(width, height, column * wide + margin, bottom, 3.2, 2.25))
        if draw(ax):
            drawn = True
        else:
            ax.set_axis_off()
    if not drawn:
        return None
    figure.suptitle("\n".join(lines), fontsize=11, y=1.0 - 0.1 / height, va="top")
    if pens_of:
        handles = [Line2D([], [], color=p.color, linestyle=p.line, linewidth=p.width, label=p.name) for p in pens_of]
        figure.legend(handles=handles, loc="lower center", ncols=beside, frameon=False, fontsize=9)
    return figure


def curves(results: Results, problem: str, measure: str, axis: str, label: str) -> Draw:
    """A measure against steps, cases or seconds: the mean over seeds, with the interval of the mean from 3 seeds on.

    Seeds are averaged at equal steps. Against seconds a point lies at the mean time that the seeds took to that step.

    Args:
        results: The results.
        problem: The problem.
        measure: The measure.
        axis: What it is drawn against.
        label: What the measure is called.
    """
    styles = pens(results)

    def draw(ax: Axes) -> bool:
        ends: list[float] = []
        for cell in reversed(results.cells[problem]):  # the reference last, on top
            ends += _draw_mean(ax, cell, styles[cell.variant.name], measure, axis)
        stray = _draw_stray(ax, results.cells[problem], styles, measure, axis, max(ends, default=0.0) or math.inf)
        if not ends and not stray:
            return False
        if measure == results.headline and problem in results.targets:
            ax.axhline(results.targets[problem], color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        _finish(ax, AXIS_LABELS[axis], label, log=True)
        if ax.get_yscale() == "log" and ends and min(ends) > 0.0:  # zeros have been given their place by `tidy`
            ax.set_ylim(bottom=0.7 * min([*ends, *_lowest(ax)]))
        return True

    return draw


def trace(results: Results, problem: str, name: str) -> Draw:
    """One of the optimizer's own numbers against steps: the median over the seeds that are done.

    Args:
        results: The results.
        problem: The problem.
        name: One of `kfacore.lab.studies.report_data.TRACES`.
    """
    styles = pens(results)

    def draw(ax: Axes) -> bool:
        everything = []
        for cell in reversed(results.cells[problem]):
            runs = [run for run in cell.runs if run.done]
            x, values = _aligned(runs, name, "step", events="steps")
            if not x.size or np.isnan(values).all():
                continue
            keep = ~np.isnan(values).all(axis=0)
            y = np.nanmedian(values[:, keep], axis=0)
            chosen = _thin(y.size)
            pen = styles[cell.variant.name]
            ax.plot(x[keep][chosen], y[chosen], **_line(pen, min(pen.width, 1.6)))
            everything.append(y)
        if not everything:
            return False
        _finish(ax, "step", TRACE_LABELS[name], log=name in _LOG_TRACES)
        if name in ("rho", "mu"):  # single wild values would flatten all the others
            low, high = np.nanpercentile(np.concatenate(everything), [1.0, 99.0])
            room = 0.15 * (high - low) or 0.1
            ax.set_ylim(low - room, high + room)
        return True

    return draw


def differences(results: Results, problem: str, label: str) -> Draw:
    """Each variant's paired difference from the reference in the headline measure, with its interval.

    Args:
        results: The results.
        problem: The problem.
        label: What the measure is called.
    """
    styles = pens(results)

    def draw(ax: Axes) -> bool:
        rows = [
            (cell, difference, difference.mean)
            for cell in results.cells[problem][1:]
            if (difference := cell.differences[results.headline]).mean is not None
        ]
        if not rows:
            return False
        for position, (cell, difference, mean) in enumerate(rows):
            pen = styles[cell.variant.name]
            if difference.low is not None and difference.high is not None:
                ax.plot([difference.low, difference.high], [position, position], color=pen.color, linewidth=2.0)
            ax.plot([mean], [position], marker="o", markersize=5.5, color=pen.color, linestyle="none")
        ax.axvline(0.0, color=INK, linewidth=1.0)
        ax.set_yticks(range(len(rows)), [_short(cell.variant.name) for cell, _, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        tidy(ax, log=False)
        sizes = np.array([abs(mean) for _, _, mean in rows])
        if sizes.max() > 30.0 * np.median(sizes) > 0.0:  # one would hide the others
            _wide_scale(ax, float(np.median(sizes)))
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(f"{label}: difference", fontsize=9)
        if len(results.cells) > 1:
            ax.set_title(problem, fontsize=10)
        ax.tick_params(labelsize=8.5)
        return True

    return draw


def profile(results: Results, axis: str) -> Draw:
    """Performance profiles, Dolan & More (2002): share of problems and seeds solved within a ratio of the best."""
    styles = pens(results)

    def draw(ax: Axes) -> bool:
        found = results.profiles.get(axis, {})
        ratios = [ratio for one in found.values() for ratio in one.ratios]
        if not ratios:
            return False
        end = max(2.0, 1.15 * max(ratios))
        for name in reversed(styles):
            if name in found:
                one = found[name]
                x = [1.0, *one.ratios, end]
                y = [one.at(1.0), *one.shares, one.shares[-1] if one.shares else 0.0]
                ax.plot(x, y, drawstyle="steps-post", **_line(styles[name]))
        if end > 4.0:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlim(1.0, end)
        _finish(ax, f"{AXIS_LABELS[axis]} to the target, ratio to the best", "share of runs solved", log=False)
        ax.set_ylim(-0.03, 1.03)
        return True

    return draw


def _wide_scale(ax: Axes, linear: float) -> None:
    """A scale that is linear up to a size and logarithmic beyond it, with 0 and powers of ten as ticks."""
    low, high = ax.get_xlim()
    largest = max(abs(low), abs(high))
    powers = [10.0**k for k in range(math.ceil(math.log10(linear)), math.floor(math.log10(largest)) + 1)]
    ax.set_xscale("symlog", linthresh=linear, linscale=1.0)
    ax.set_xlim(min(1.6 * low, -linear), 1.6 * max(high, linear))
    ticks = [*(-power for power in powers if power <= -low), 0.0, *(power for power in powers if power <= high)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)


def _draw_mean(ax: Axes, cell: Cell, pen: Pen, measure: str, axis: str) -> list[float]:
    """Mean and band of a variant's finished runs; returns the heights that the picture must show."""
    runs = [run for run in cell.runs if run.done]
    x, values = _aligned(runs, measure, axis, events="evals")
    keep = np.isfinite(values).all(axis=0) if values.size else np.zeros(0, dtype=bool)
    if not keep.any():
        return []
    x, values = x[keep], values[:, keep]
    chosen = _thin(x.size)
    x, values = x[chosen], values[:, chosen]
    mean = values.mean(axis=0)
    n = len(runs)
    if n >= MIN_INTERVAL:
        half = t_quantile(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
        low = mean - half
        if float(values.min()) > 0.0:  # a logarithmic axis has no 0; the band leaves the picture at its lower edge
            low = np.maximum(low, 1e-3 * float(values.min()))
        band = ax.fill_between(x, low, mean + half, color=pen.color, alpha=0.16, linewidth=0.0)
        band.set_gid(pen.group)
    elif n > 1:
        for line in values:
            ax.plot(x, line, **_line(pen, 0.7))
    ax.plot(x, mean, **_line(pen))
    return [float(values.min()), float(values.max())]


def _draw_stray(ax: Axes, cells: Sequence[Cell], styles: dict[str, Pen], measure: str, axis: str, top: float) -> bool:
    """Runs that are not done, one by one up to their last value; those that left the picture end at its top."""
    drawn = False
    for cell in cells:
        pen = styles[cell.variant.name]
        for run in cell.runs:
            if run.done:
                continue
            x, y = run.evals[axis], run.values(measure)
            keep = np.isfinite(y)
            if not keep.any():
                continue
            x, y = x[keep], np.minimum(y[keep], 2.0 * top)
            ended = run.state in ("diverged", "failed")
            ax.plot(x, y, color=pen.color, linewidth=0.9, linestyle=(0, (3, 2)), gid=pen.group)
            end: dict[str, Any] = {
                "marker": "X" if ended else ">",
                "markersize": 7.0 if ended else 5.0,
                "linestyle": "none",
            }
            ax.plot(x[-1:], y[-1:], color=pen.color, gid=pen.group, **end)
            drawn = True
    return drawn


def _lowest(ax: Axes) -> list[float]:
    """The lowest points above 0 of the lines in a picture."""
    lines = [np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()]
    return [float(y[y > 0.0].min()) for y in lines if (y > 0.0).any()]


def _aligned(runs: Sequence[RunData], name: str, axis: str, *, events: str) -> tuple[np.ndarray, np.ndarray]:
    """The x of the steps that all runs have, and one row of values a run."""
    empty = np.zeros(0), np.zeros((len(runs), 0))
    tables = [run.steps if events == "steps" else run.evals for run in runs]
    if not tables:
        return empty
    steps = tables[0]["step"]
    for table in tables[1:]:
        steps = np.intersect1d(steps, table["step"])
    if not steps.size:
        return empty
    steps = np.unique(steps)
    xs, ys = [], []
    for run, table in zip(runs, tables, strict=True):
        _, first = np.unique(table["step"], return_index=True)
        position = first[np.searchsorted(table["step"][first], steps)]
        xs.append(table[axis][position])
        ys.append((table[name] if events == "steps" else run.values(name))[position])
    return np.mean(xs, axis=0), np.array(ys)


def _thin(size: int) -> np.ndarray:
    """Which points of a line are drawn: all, or about `_POINTS` evenly spread with both ends."""
    if size <= _POINTS:
        return np.arange(size)
    return np.unique(np.linspace(0, size - 1, _POINTS).round().astype(int))


def _line(pen: Pen, width: float | None = None) -> dict[str, Any]:
    return {
        "color": pen.color,
        "linestyle": pen.line,
        "linewidth": pen.width if width is None else width,
        "gid": pen.group,
    }


def _finish(ax: Axes, x_label: str, y_label: str, *, log: bool) -> None:
    tidy(ax, log=log)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    ax.tick_params(labelsize=8.5)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"
