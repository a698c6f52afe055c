"""Pictures of an inspection: matrices as the paper shows them, and what updates buy over a range of gamma."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfacore.lab.training.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kfacore.lab.diagnostics.matrices import DenseReport
    from kfacore.lab.diagnostics.quality import UpdateQuality

__all__ = ["Panel", "draw_fisher", "draw_inverse", "draw_matrices", "draw_quality", "draw_rows", "layer_names"]

_COLOURS = ("#1b6ca8", "#d1661f", "#4a8c4a", "#8a5aa8", "#7a6a4f", "#b03a5b")

_BRIGHTEST = 0.995
"""Entries above this quantile are all white, so that a few large ones do not leave the rest black."""

Panel = tuple[str, Tensor]
"""A title and a matrix."""


def draw_fisher(report: DenseReport, title: str) -> Figure:
    """|F|, |F-tilde| and |F - F-tilde| (the paper's Figure 1)."""
    panels = [
        ("exact Fisher $F$", report.F),
        (r"Kronecker-factored $\tilde F$", report.F_tilde),
        (r"difference $|F - \tilde F|$", report.F - report.F_tilde),
    ]
    return draw_rows([panels], report.sizes, layer_names(report), title)


def draw_inverse(report: DenseReport, averages: Tensor, title: str) -> Figure:
    """|F-tilde|, |F-tilde^-1| and the averages of the inverse's blocks (the paper's Figure 2).

    Args:
        report: The matrices.
        averages: `block_average` of the inverse.
        title: Title of the picture.
    """
    figure = new_figure(11.0, 4.2)
    axes = figure.subplots(1, 3)
    names = layer_names(report)
    draw_matrices(
        axes[0], rf"$\tilde F$, damped with $\gamma$ = {report.gamma:.3g}", report.F_tilde_damped, report.sizes, names
    )
    draw_matrices(axes[1], r"its exact inverse $\tilde F^{-1}$", report.F_tilde_inverse, report.sizes, names)
    _draw_averages(axes[2], averages, names)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_rows(rows: Sequence[Sequence[Panel]], sizes: Sequence[int], names: Sequence[str], title: str) -> Figure:
    """Rows of matrices; all panels of a row share one scale, set by the first one (as in Figures 1, 5 and 6).

    Args:
        rows: Panels, equally many in each row.
        sizes: Parameters of each layer.
        names: Names of the layers.
        title: Title of the picture.
    """
    figure = new_figure(3.7 * len(rows[0]), 3.75 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, panels in enumerate(rows):
        top = _brightest(panels[0][1])
        for column, (label, matrix) in enumerate(panels):
            draw_matrices(axes[row, column], label, matrix, sizes, names, top)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_matrices(
    ax: Axes, label: str, matrix: Tensor, sizes: Sequence[int], names: Sequence[str], top: float | None = None
) -> None:
    """Absolute values of a matrix's entries, white is large, with dashed lines between layers.

    Args:
        ax: Where to draw.
        label: Title of the panel.
        matrix: (P, P).
        sizes: Parameters of each layer.
        names: Names of the layers.
        top: The value that is white; a high quantile of the matrix's own entries if left out.
    """
    values = _shrunk(matrix.abs())
    top = _brightest(matrix) if top is None else top
    total = sum(sizes)
    # the extent keeps the axes in units of parameters, whatever the picture was shrunk to
    ax.imshow(
        values.cpu().numpy(), cmap="gray", vmin=0.0, vmax=top or 1.0, extent=(0, total, total, 0), interpolation="none"
    )
    edges = [0, *accumulate(sizes)]
    for edge in edges[1:-1]:
        ax.axhline(edge, color="#5fb0e8", linewidth=0.7, linestyle="--")
        ax.axvline(edge, color="#5fb0e8", linewidth=0.7, linestyle="--")
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    ax.set_xticks(middles, labels=list(names), fontsize=8)
    ax.set_yticks(middles, labels=list(names), fontsize=8, rotation=90, va="center")
    ax.tick_params(length=0)
    ax.set_title(label, fontsize=10)


def _draw_averages(ax: Axes, averages: Tensor, names: Sequence[str]) -> None:
    values = averages.cpu()
    ax.imshow(values.numpy(), cmap="gray", vmin=0.0, vmax=float(values.max()))
    for i in range(len(values)):
        for j in range(len(values)):
            value = float(values[i, j])
            ax.text(
                j,
                i,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=9,
                color="black" if value > 0.6 * float(values.max()) else "white",
            )
    ax.set_xticks(range(len(names)), labels=list(names), fontsize=8)
    ax.set_yticks(range(len(names)), labels=list(names), fontsize=8, rotation=90, va="center")
    ax.tick_params(length=0)
    ax.set_title("mean absolute entry of each block", fontsize=10)


def draw_quality(rows: Sequence[UpdateQuality], gamma: float, title: str) -> Figure:
    """Cosine to the natural gradient, decrease of the quadratic model, and of the objective, over gamma (Figure 7).

    Args:
        rows: Every approximation at every gamma.
        gamma: The one in use, marked by a vertical line.
        title: Title of the picture.
    """
    names = list(dict.fromkeys(row.approx for row in rows))
    figure = new_figure(12.0, 4.3)
    axes = figure.subplots(1, 3)
    for index, name in enumerate(names):
        mine = sorted((row for row in rows if row.approx == name), key=lambda row: row.gamma)
        gammas = [row.gamma for row in mine]
        colour = _COLOURS[index % len(_COLOURS)]
        solid: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.6}
        dashed = {**solid, "linestyle": "--", "markersize": 2.5, "linewidth": 1.1}
        axes[0].plot(gammas, [row.cosine for row in mine], label=name, **solid)
        axes[1].plot(gammas, [row.rescaled for row in mine], **solid)
        axes[1].plot(gammas, [_clipped(row.unscaled) for row in mine], **dashed)
        best = max(row.improvement_rescaled or 0.0 for row in rows)
        axes[2].plot(gammas, [_gain(row.improvement_rescaled, best) for row in mine], **solid)
        axes[2].plot(gammas, [_gain(row.improvement_unscaled, best) for row in mine], **dashed)
    titles = (
        "cosine to the natural gradient",
        "decrease of the quadratic model,\nshare of the best possible",
        "decrease of the objective $h$",
    )
    for ax, label in zip(axes, titles, strict=True):
        tidy(ax, log=False)
        ax.set_xscale("log")
        ax.axvline(gamma, color="#8a939a", linewidth=1.0, linestyle=":")
        ax.set_xlabel(r"$\gamma$")
        ax.set_title(label, fontsize=10)
    axes[1].axhline(0.0, color="#8a939a", linewidth=0.8)
    axes[2].axhline(0.0, color="#8a939a", linewidth=0.8)
    axes[1].plot([], [], color="black", linewidth=1.6, label="re-scaled by the exact model")
    axes[1].plot([], [], color="black", linewidth=1.1, linestyle="--", label="as it is")
    handles, labels = axes[0].get_legend_handles_labels()
    more, texts = axes[1].get_legend_handles_labels()
    figure.legend(
        handles + more, labels + texts, loc="outside lower center", ncols=len(labels) + 2, frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    return figure


def _clipped(share: float) -> float:
    """Steps that hurt leave the picture below -0.25: how far does not matter, and would hide everything else."""
    return share if share > -0.25 else float("nan")


def _gain(improvement: float | None, best: float) -> float:
    return improvement if improvement is not None and improvement > -0.25 * best else float("nan")


def layer_names(report: DenseReport) -> list[str]:
    """What the layers are called in pictures: their numbers in the model."""
    return [f"layer {report.first + i}" for i in range(len(report.layers))]


def _brightest(matrix: Tensor) -> float:
    values = matrix.abs().reshape(-1)
    rank = max(1, int(_BRIGHTEST * values.numel()))
    return float(values.kthvalue(rank).values)


def _shrunk(matrix: Tensor, most: int = 400) -> Tensor:
    """Means over small squares, so that a picture stays small and thin lines do not vanish between pixels."""
    factor = -(-matrix.shape[0] // most)
    if factor == 1:
        return matrix
    return torch.nn.functional.avg_pool2d(matrix[None, None], factor, ceil_mode=True)[0, 0]
