"""The picture of the model: milliseconds of a step on 1 to 1,024 ranks, and what they are over a plain step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.ranks.model import VARIANTS, Machine, Schedule, cost
from benchmarks.ranks.shapes import Net

__all__ = ["draw"]

_LABELS = {
    "all": "all: nothing divided",
    "every": "every: inverses sent to all",
    "owner": "owner: directions sent to all",
}
_STYLES = {"all": ("#b0413e", "o"), "every": ("#2b6a8f", "s"), "owner": ("#4a8f4a", "^")}


def draw(net: Net, machine: Machine, schedule: Schedule, counts: Sequence[int], file: Path) -> None:
    """Write the picture.

    Args:
        net: The net.
        machine: What a rank is.
        schedule: How often factors are refreshed.
        counts: Numbers of ranks.
        file: Where it goes; its ending says the format.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    plain = [cost(net, machine, ranks, "all", schedule).plain for ranks in counts]
    left.plot(counts, [1e3 * seconds for seconds in plain], color="0.3", linestyle="--", label="without K-FAC")
    for variant in VARIANTS:
        color, marker = _STYLES[variant]
        found = [cost(net, machine, ranks, variant, schedule) for ranks in counts]
        style = {"color": color, "marker": marker, "markersize": 4}
        left.plot(counts, [1e3 * each.step for each in found], label=_LABELS[variant], **style)
        right.plot(counts, [each.step / own for each, own in zip(found, plain, strict=True)], **style)
    right.axhline(1.0, color="0.3", linestyle="--")
    for axes, label in ((left, "ms a mean step (model)"), (right, "times a step without (model)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts[::2], [str(count) for count in counts[::2]])
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    right.set_yscale("log")
    left.legend(fontsize=8, loc="upper right")
    figure.suptitle(f"{net.name}, {net.batch:,} tokens a step, {machine.name}", fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)
