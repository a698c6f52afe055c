"""The role of what trains the model, and the report of one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kfacore.roles.likelihood import Likelihood

__all__ = ["Optimizer", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """What happened in one step. Tensors are scalars on the device: reading one is what synchronises.

    Attributes:
        step: Number of the step, from 1.
        batch_size: Cases in the mini-batch.
        loss: Mean over cases of the negative log-likelihood, before the step.
        objective: `loss` plus the weight decay term.
        error: Mean over cases of the likelihood's error, before the step.
        model_value: Predicted change of the objective, or None if there is no quadratic model.
        rho: Reduction ratio where it was computed in this step, else None.
        lam: lambda used in this step, or None.
        gamma: gamma used in this step, or None.
        alpha: Learning rate of the step, or None.
        mu: Momentum coefficient of the step, or None.
        refreshed: Whether the approximate inverse was recomputed.
        accepted: Whether the step was kept; a step that was undone has left the parameters as they were.
        undone: Steps undone on this mini-batch, the reported one included if it was.
        notices: What was reported by name in this step (extra jitter, kept inverses).
    """

    step: int
    batch_size: int
    loss: Tensor
    objective: Tensor
    error: Tensor
    model_value: Tensor | None = None
    rho: Tensor | None = None
    lam: Tensor | None = None
    gamma: Tensor | None = None
    alpha: Tensor | None = None
    mu: Tensor | None = None
    refreshed: bool = False
    accepted: bool | Tensor = True
    undone: int = 0
    notices: tuple[str, ...] = ()


class Optimizer(ABC):
    """What `kfac train` asks of an optimizer. `kfacore.KFAC` is one; so is a wrapped torch optimizer."""

    @classmethod
    @abstractmethod
    def for_run(
        cls,
        config: Any,
        *,
        model: nn.Module,
        likelihood: Likelihood,
        parts: Mapping[str, Any],
        weight_decay: float,
        seed: int,
    ) -> Optimizer:
        """Build it for a run.

        Args:
            config: The component's config object.
            model: The model, already on its device and in its dtype.
            likelihood: The likelihood.
            parts: Built parts of the slots that the manifest says this optimizer uses, by slot.
            weight_decay: eta of the objective.
            seed: Seed of every draw the optimizer makes.
        """

    @abstractmethod
    def step(self, inputs: Any, targets: Tensor) -> StepReport:
        """Take one step on a mini-batch: forward, backward and update."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors, numbers, strings and containers only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
