"""The picture: loss on held-out data against processor seconds and against steps, a row a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.real.race import Record
from benchmarks.real.table import curve

__all__ = ["draw"]

_COLORS = {
    "kfac": "#b0413e",
    "kfac-tridiag": "#e08e45",
    "guest": "#4a8f4a",
    "adamw": "#2b6a8f",
    "muon": "#7a5195",
    "soap": "0.45",
}


def draw(records: Sequence[Record], file: Path) -> None:
    """Write the picture of runs with seed 0; the file's ending says the format."""
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = plt.subplots(2, len(models), figsize=(3.1 * len(models), 5.4), layout="constrained", squeeze=False)
    for (by_seconds, by_steps), model in zip(axes.T, models, strict=True):
        for record in records:
            if record["model"] != model or record["seed"]:
                continue
            found, method = curve(record), record["method"]
            for axis, at in ((by_seconds, found.seconds), (by_steps, found.steps)):
                axis.plot(at, found.losses, color=_COLORS[method], label=method, linewidth=1.4)
        by_seconds.set_title(model)
        by_seconds.set_xlabel("processor seconds")
        by_steps.set_xlabel("steps")
        by_steps.set_xscale("symlog", linthresh=10)
        highest = min(record["curve"][0][3] for record in records if record["model"] == model)
        lowest = min(row[3] for record in records if record["model"] == model for row in record["curve"] if row[3])
        for axis in (by_seconds, by_steps):
            axis.set_ylim(lowest - 0.05 * (highest - lowest), 1.1 * highest)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("held-out loss")
    axes[1, 0].set_ylabel("held-out loss")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)
