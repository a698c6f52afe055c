"""Draws docs/images/trust.png: a step that is undone, and what becomes of training without that.

``python docs/figures/trust.py`` (needs scikit-learn, for its digits; ten seconds)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_plugins.trust.undo import Undo
from kfacore import KFAC, NumericalError
from kfacore.optim.objective import penalty

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

PICTURE = Path(__file__).parent.parent / "images" / "trust.png"
STEPS, BATCH, SEED = 40, 128, 0
WITH, WITHOUT = "#1f5fa8", "#b5482a"


class Recorded(Undo):
    """Trust that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[float] = []

    def accepts(self, before: Tensor, change: Tensor) -> Tensor:
        """As `Undo`; keeps h after the step, on its own mini-batch."""
        self.tried.append(float(before + change))
        return super().accepts(before, change)


@dataclass
class Run:
    """A training run: its first mini-batch and the loss of all examples before every step."""

    losses: list[float] = field(default_factory=list)
    undone: int = 0  # attempts of the first step
    late: list[int] = field(default_factory=list)  # steps that the next mini-batch undid


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: inputs (1797, 64) in [0, 1], classes (1797,)."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def net() -> nn.Sequential:
    """64-256-256-10, relu, torch's own initialisation."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(trust: str | Undo) -> Run:
    """Train until the numbers stop being finite, at most `STEPS` steps."""
    x, y = digits()
    model = net()
    optimizer = KFAC(model, likelihood="categorical", approx="tridiag", trust=trust, seed=SEED)
    order = torch.Generator().manual_seed(SEED)
    run = Run()
    for _ in range(STEPS):
        with torch.no_grad():
            run.losses.append(float(nn.functional.cross_entropy(model(x), y)))
        batch = torch.randperm(len(x), generator=order)[:BATCH]
        try:
            report = optimizer.step(x[batch], y[batch])
        except NumericalError:
            break
        run.undone = run.undone or report.undone
        if any("was undone" in notice for notice in report.notices):
            run.late.append(report.step - 1)
    return run


def along_the_first_step(shares: Tensor) -> tuple[list[float], Tensor]:
    """h of the first mini-batch, and its quadratic model, at theta + s delta for every share s of the first step."""
    x, y = digits()
    model = net()
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:BATCH]
    optimizer = KFAC(model, likelihood="categorical", approx="tridiag", trust="none", seed=SEED)
    report = optimizer.step(x[batch], y[batch])
    steps = [now.detach() - before for now, before in zip(parameters, start, strict=True)]
    found = []
    with torch.no_grad():
        for share in shares:
            for parameter, before, step in zip(parameters, start, steps, strict=True):
                parameter.copy_(before + share * step)
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            found.append(float(loss + penalty(parameters, optimizer.weight_decay)))
    assert report.model_value is not None
    # The step is the model's minimum along itself, so the model is a parabola with its least value at s = 1.
    return found, found[0] + float(report.model_value) * (2 * shares - shares**2)


def draw() -> None:
    """Both panels."""
    torch.set_num_threads(1)
    trust = Recorded()
    with_trust, without = train(trust), train("none")
    shares = torch.linspace(0, 1.1, 56)
    objective, model = along_the_first_step(shares)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    left.plot(shares, objective, color=WITHOUT, label="objective of the mini-batch")
    left.plot(shares, model, color="0.45", linestyle="--", label="its quadratic model")
    left.plot([1], [float(model.min())], "o", color="0.45", label="where the step goes")
    left.set(xlabel="share of the first step", ylabel="objective", title="Why it is undone")
    left.set_ylim(1.2 * float(model.min()), 4 * objective[0])
    left.legend(loc="upper left", frameon=False)

    right.semilogy(range(len(without.losses)), without.losses, ".-", color=WITHOUT, label='trust = "none"')
    right.semilogy(range(len(with_trust.losses)), with_trust.losses, ".-", color=WITH, label='trust = "undo"')
    undone = trust.tried[: with_trust.undone]
    right.semilogy([1] * len(undone), undone, "x", color=WITH, label="attempts of step 1 that were undone")
    right.semilogy(
        with_trust.late,
        [with_trust.losses[step] for step in with_trust.late],
        "o",
        color=WITH,
        markersize=9,
        markerfacecolor="none",
        label="undone by the next mini-batch",
    )
    right.set(xlabel="steps", ylabel="cross-entropy of all examples", title="What becomes of training")
    right.set_ylim(0.01, 1e4)
    right.legend(loc="upper right", frameon=False)
    figure.savefig(PICTURE, dpi=110)
    tried = ", ".join(f"{value:.3g}" for value in undone)
    print(f"{PICTURE.name}: {with_trust.undone} attempts undone at {tried}; steps undone later: {with_trust.late}")
    print(f"after {STEPS - 1} steps {with_trust.losses[-1]:.3g}, without trust {without.losses}")


if __name__ == "__main__":
    draw()
