"""What all pictures share: how they look and how they are written. Imports no torch.

Drawn with matplotlib's Agg canvas and without its global state, so that no display is needed; matplotlib itself is
imported when something is drawn.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.training.files import atomic_write, disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["new_figure", "number", "save_figure", "tidy"]


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


def tidy(ax: Axes, *, log: bool) -> None:
    """One look for all axes: a logarithmic scale where all values are positive and span enough, a light grid.

    Args:
        ax: The axes, with their lines drawn.
        log: Whether a logarithmic scale makes sense for the quantity.
    """
    values = [float(y) for line in ax.get_lines() for y in line.get_ydata() if math.isfinite(float(y))]  # type: ignore[union-attr, arg-type]  # matplotlib's stubs allow more than a line holds
    if log and values and min(values) > 0.0 and max(values) > 3.0 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        ax.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        if decades < 2.0:  # too few powers of ten to read a value from: label more of the lines
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(visible=True, which="major", color="#e4e8eb", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def number(value: Any) -> float | None:
    """A value of an event as a finite number, or None if it is not one."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )
