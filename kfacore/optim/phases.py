"""What the phases of a step hand to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfacore.network import Accumulated, BlockVector, Linearization
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.joint import BoundJoint
from kfacore.parallel.whole import Whole
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.optimizer import StepReport

__all__ = ["At", "Trial"]


@dataclass
class At:
    """Where a step begins: its mini-batch at the parameters as they are.

    Attributes:
        step: Number of the step, k.
        eta: Weight decay.
        lr: What the step is multiplied by.
        inputs: Of the mini-batch.
        targets: Of the mini-batch.
        valid: Positions that count.
        batch: The linearised mini-batch.
        bound: Its loss.
        loss: Mean loss, () float64.
        objective: h, () float64.
        error: The reported error, ().
        adapts: Whether lambda is adapted after this step.
        asks: Whether the rule of trust wants h after this step besides.
        iterations: Steps on the quadratic model.
        several: Whether it is a list of micro-batches.
        whole: The mini-batch of all processes, of which inputs and targets are this one's part.
        sampled: The loss, divided by the S of the estimator's cases.
        curved: The loss, divided by the S of the quadratic model's cases.
        positions: Positions of a case that numbers of cases are counted by, see `Iteration.positions`.
        fewest: The same for the next mini-batch.
        waits: Whether this step waits for the device anyway.
        undone: What is to be said about the step before.
    """

    step: int
    eta: float
    lr: float
    inputs: Any
    targets: Any
    valid: Tensor | None
    batch: Linearization | Accumulated
    bound: BoundLoss | BoundJoint
    loss: Tensor
    objective: Tensor
    error: Tensor
    adapts: bool
    asks: bool
    iterations: int
    several: bool
    whole: Whole
    sampled: BoundLoss | BoundJoint
    curved: BoundLoss | BoundJoint
    positions: int
    fewest: int
    waits: bool = False
    undone: tuple[str, ...] = ()

    @cached_property
    def now(self) -> float:
        """h on the host, read once; a wait where it is on a device."""
        return float(self.objective)


@dataclass
class Trial:
    """A step that was tried.

    Attributes:
        proposal: Delta.
        inverse: The inverse that it is made with.
        further: The whole step, where it has several iterations.
        alpha: Learning rate, ().
        mu: Momentum coefficient, ().
        value: Predicted change of h, () float64.
        used: Whether there is a quadratic model.
        lam: lambda.
        gamma: gamma.
        refreshed: Whether the inverse was made for it.
        notices: What must be reported.
        promised: ``value`` on the host, where it was read.
        change: What it changed h by, () float64, where that was asked.
        rho: Reduction ratio, () float64, likewise.
        accepted: Whether the step is kept, () bool.
    """

    proposal: BlockVector
    inverse: Inverse
    further: BlockVector | None
    alpha: Tensor
    mu: Tensor
    value: Tensor
    used: bool
    lam: Tensor
    gamma: Tensor
    refreshed: bool
    notices: list[Notice]
    promised: float | None
    change: Tensor | None = None
    rho: Tensor | None = None
    accepted: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    def kept(self) -> bool:
        """``accepted`` on the host. A step that was not asked about is, if what the model promised is a number."""
        if self.change is None and self.promised is not None:
            return math.isfinite(self.promised)
        return bool(self.accepted)

    def shorten(self, share: float) -> None:
        """Only this share of the step was taken; of a step to the minimum the model then promises 2 t - t^2."""
        self.alpha, self.mu = share * self.alpha, share * self.mu
        self.value = (2.0 * share - share**2) * self.value

    def report(self, at: At, undone: int) -> StepReport:
        """The step's report."""
        return StepReport(
            step=at.step,
            batch_size=at.whole.cases,
            loss=at.loss,
            objective=at.objective,
            error=at.error,
            model_value=self.value if self.used else None,
            rho=self.rho,
            lam=self.lam,
            gamma=self.gamma,
            alpha=self.alpha,
            mu=self.mu,
            refreshed=self.refreshed,
            accepted=self.accepted,
            undone=undone,
            notices=(*at.undone, *(str(notice) for notice in self.notices)),
        )
