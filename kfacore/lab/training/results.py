"""What training tells in plain Python: the scalars of a step, the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kfacore.roles import StepReport

__all__ = ["RunResult", "read_scalars"]

_SCALARS = ("loss", "objective", "error", "lam", "gamma", "rho", "alpha", "mu")


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run: The run folder.
        step: Steps taken in all.
        seconds: Training seconds in all, without evaluation and checkpoints.
        measures: The last evaluation: ``train_loss``, ``train_error``, ``test_...``, ``averaged_...``.
        plots: The pictures drawn.
    """

    run: Path
    step: int
    seconds: float
    measures: Mapping[str, float | None]
    plots: tuple[Path, ...]


def read_scalars(report: StepReport) -> dict[str, float | None]:
    """The scalars of a report as Python numbers, in one transfer from each device they live on (usually one in all).

    Args:
        report: The report of a step.

    Returns:
        Loss, objective, error, lam, gamma, rho, alpha and mu; None where the report has none.
    """
    values: dict[str, float | None] = dict.fromkeys(_SCALARS)
    homes: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name in _SCALARS:
        value = getattr(report, name)
        if value is not None:
            homes.setdefault(value.device, []).append((name, value.detach().reshape(()).to(torch.float64)))
    for scalars in homes.values():
        numbers = torch.stack([value for _, value in scalars]).tolist()
        values.update(zip((name for name, _ in scalars), numbers, strict=True))
    return values
