"""What all pictures share: how they look and how they are written. Imports no torch.

Drawn with matplotlib's Agg canvas and without its global state, so that no display is needed; matplotlib itself is
imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.lab.training.files import atomic_write, disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["clip_view", "mark_edge", "new_figure", "number", "save_figure", "tidy"]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that keeps labels and legends from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all.

    Raises:
        ResourceError: The disk refused.
    """
    with disk_errors(path):
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def tidy(ax: Axes, *, log: bool, like: Sequence[Axes] = ()) -> None:
    """One look for all axes: a logarithmic scale where the positive values span enough, a light grid.

    A logarithmic axis has no place for 0 (an error of a classifier may be 0), nor for the few negative values that some
    quantities have (a learning rate): lines that come to them leave through the bottom, with a mark where they do.
    What is too large for any axis leaves through the top.

    Args:
        ax: The axes, with their lines drawn.
        log: Whether a logarithmic scale makes sense for the quantity.
        like: Further axes that show the same quantity, and must have the same scale.
    """
    values = [y for other in (ax, *like) for y in _heights(other)]
    positive = [min(y, _HUGE) for y in values if y >= _TINY]
    few_negative = sum(y < 0.0 for y in values) <= _FEW * len(values)
    if log and positive and few_negative and max(positive) / 3.0 > min(positive):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        decades = math.log10(max(positive)) - math.log10(min(positive))
        if min(values) < _TINY or max(values) > _HUGE:  # before the scale, which warns of axes without such values
            ax.set_ylim(0.5 * min(positive), max(positive) * 10.0 ** (0.05 * decades))
        ax.set_yscale("log")
        if decades < 2.0:  # too few powers of ten to read a value from: label more of the lines
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
        points = _points(ax)
        mark_edge(ax, [x for x, y in points if y < _TINY], top=False, color="#444444")
        mark_edge(ax, [x for x, y in points if y > _HUGE], top=True, color="#444444")
    ax.grid(visible=True, which="major", color="#e4e8eb", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def mark_edge(ax: Axes, xs: Sequence[float], *, top: bool, color: str, label: str | None = None) -> None:
    """Marks on the upper or lower edge of the axes for values that lie beyond it.

    Args:
        ax: The axes.
        xs: Where.
        top: Which edge.
        color: Colour of the marks.
        label: What they are called in a legend.
    """
    if not xs:
        return
    # A mixed transform: x in data, y in axes. The marks stay on the edge whatever the limits become.
    ax.plot(
        list(xs),
        [1.0 if top else 0.0] * len(xs),
        transform=ax.get_xaxis_transform(),
        linestyle="none",
        marker="^" if top else "v",
        markersize=6.0,
        color=color,
        clip_on=False,
        label=label or "_beyond",
    )


def clip_view(ax: Axes, *, log: bool) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Limit the axes to where nearly all values lie, if a few of them would flatten the rest.

    The limits are the 2% and 98% quantiles with a margin, and take effect if the whole range is more than three times
    as large.

    Args:
        ax: The axes, with their lines drawn and their scale set.
        log: Whether the scale is logarithmic.

    Returns:
        The points (x, y) above and below the view.
    """
    points = [(x, y) for x, y in _points(ax) if y > 0.0 or not log]
    if len(points) < _FEWEST:
        return [], []
    heights = sorted(math.log(y) if log else y for _, y in points)
    low, high = (heights[round(share * (len(heights) - 1))] for share in (_TAIL, 1.0 - _TAIL))
    if high <= low or heights[-1] - heights[0] <= 3.0 * (high - low):
        return [], []
    margin = 0.25 * (high - low)
    bottom, top = max(low - margin, heights[0]), min(high + margin, heights[-1])
    pad = 0.05 * (top - bottom)
    bottom, top = bottom - pad, top + pad
    ax.set_ylim((math.exp(bottom), math.exp(top)) if log else (bottom, top))
    lowest, highest = ax.get_ylim()
    return [(x, y) for x, y in points if y > highest], [(x, y) for x, y in points if y < lowest]


_FEWEST = 20
"""Values below which nothing is called an exception."""

_TAIL = 0.02

_TINY, _HUGE = 1e-200, 1e200
"""What a logarithmic axis can show: towards the ends of double precision its ticks overflow."""

_FEW = 0.05
"""Share of negative values that a logarithmic scale may leave out."""


def _points(ax: Axes) -> list[tuple[float, float]]:
    """All finite points of the lines drawn in data coordinates."""
    import numpy as np

    drawn = [line for line in ax.get_lines() if line.get_transform().contains_branch(ax.transData)]
    pairs = [pair for line in drawn for pair in np.asarray(line.get_xydata(), dtype=np.float64).tolist()]
    return [(x, y) for x, y in pairs if math.isfinite(y)]


def _heights(ax: Axes) -> list[float]:
    return [y for _, y in _points(ax)]


def number(value: Any) -> float | None:
    """A value of an event as a finite number, or None if it is not one."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )
