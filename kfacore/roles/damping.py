"""The role of damping: lambda of the quadratic model and gamma of the approximate inverse."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfacore.roles.base import Part
from kfacore.schema.slots import DampingConfig

__all__ = ["Damping"]


class Damping(Part):
    """Holds lambda and gamma as float64 scalars on the device and adapts them (method, sections 2.5 and 5).

    Attributes:
        uses_model: Whether candidates or adaptation need the quadratic model's value.
        lam: lambda, ().
        gamma: gamma, ().
    """

    config: DampingConfig
    uses_model: ClassVar[bool] = True
    lam: Tensor
    gamma: Tensor

    @abstractmethod
    def start(self, weight_decay: float, device: torch.device) -> None:
        """Set `lam` and `gamma` to their first values; eta is the objective's weight decay."""

    def follow(self, weight_decay: float) -> None:  # optional: not every strategy looks at eta
        """Called when the objective's weight decay has changed since `start`: on loading a state, or by the user."""

    def observe(self, curvature: Tensor) -> None:  # optional: most strategies are told where to start
        """Called once, with the statistics of the first step and before its candidates.

        Args:
            curvature: Mean diagonal entry of the Fisher, (), float64.
        """

    def candidates(self, step: int) -> list[Tensor]:
        """The gammas to compare in this step; a step with several always refreshes."""
        return [self.gamma]

    def choose(self, gamma: Tensor) -> None:
        """Take up the candidate whose model value was smallest."""
        self.gamma = gamma

    def adapts(self, step: int) -> bool:
        """Whether lambda is adapted after this step, which costs one forward pass for rho."""
        return False

    def adapt(self, rho: Tensor) -> None:
        """Adapt lambda to the reduction ratio, without waiting for the device.

        Args:
            rho: (), float64; -inf where the objective went up, NaN where it is not a number.
        """

    def strengthen(self, factor: float, where: Tensor) -> None:
        """Raise lambda, because a step was undone; a strategy without one does nothing.

        Args:
            factor: What lambda is multiplied with.
            where: (), bool: whether at all.
        """

    def caution(self, factor: float, where: Tensor) -> None:
        """Raise lambda, because the next mini-batch had a step undone that its own had accepted; as `strengthen`.

        Args:
            factor: What lambda is multiplied with.
            where: (), bool: whether at all.
        """
        self.strengthen(factor, where)

    def confirm(self, slope: Tensor, curvature: Tensor) -> None:  # optional: most ask the step's own mini-batch only
        """Told in every step what a new mini-batch sees of the step before, in units of the decrease it promised.

        Args:
            slope: (), float64: derivative of h along the last step v where it ended, b_v; NaN if there was none. It is
                0 after a step to the minimum, and v^T F v after one that went twice as far.
            curvature: (), float64: v^T (F + eta I) v.
        """

    def state_dict(self) -> dict[str, Any]:
        """Lambda and gamma."""
        return {"lam": self.lam, "gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up lambda and gamma."""
        self.lam = state["lam"].to(self.lam)
        self.gamma = state["gamma"].to(self.gamma)
