"""What training tells in plain Python: the scalars of a step, the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kfacore.lab.training.outcome import Losses, Verdict
from kfacore.roles import StepReport

__all__ = ["RunResult", "read_scalars"]

_SCALARS = ("loss", "objective", "error", "lam", "gamma", "rho", "alpha", "mu")
_UNDONE = "undone"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run: The run folder.
        step: Steps taken in all.
        seconds: Training seconds in all, without evaluation and checkpoints.
        measures: The last evaluation: ``train_loss``, ``train_error``, ``test_...``, ``averaged_...``.
        plots: The pictures drawn.
        losses: First, best and last training loss, and the verdict on them.
        rejected: Steps that were undone.
        best: The file with the parameters of the smallest training loss; None where none was below the first.
        advice: What to try, where the run has diverged; empty otherwise.
    """

    run: Path
    step: int
    seconds: float
    measures: Mapping[str, float | None]
    plots: tuple[Path, ...]
    losses: Losses = field(default_factory=Losses)
    rejected: int = 0
    best: Path | None = None
    advice: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the run fell apart."""
        return self.losses.verdict


def read_scalars(report: StepReport) -> dict[str, float | None]:
    """The scalars of a report as Python numbers, in one transfer from each device they live on (usually one in all).

    Args:
        report: The report of a step.

    Returns:
        Loss, objective, error, lam, gamma, rho, alpha and mu; None where the report has none. ``undone`` besides,
        1.0, if the step was not accepted.
    """
    values: dict[str, float | None] = dict.fromkeys(_SCALARS)
    homes: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name in _SCALARS:
        value = getattr(report, name)
        if value is not None:
            homes.setdefault(value.device, []).append((name, value.detach().reshape(()).to(torch.float64)))
    accepted = getattr(report, "accepted", None)  # which optimizers of plug-ins need not have
    if isinstance(accepted, Tensor):
        homes.setdefault(accepted.device, []).append((_UNDONE, 1.0 - accepted.detach().reshape(()).to(torch.float64)))
    elif accepted is False:
        values[_UNDONE] = 1.0
    for scalars in homes.values():
        numbers = torch.stack([value for _, value in scalars]).tolist()
        values.update(zip((name for name, _ in scalars), numbers, strict=True))
    if not values.get(_UNDONE):
        values.pop(_UNDONE, None)
    return values
