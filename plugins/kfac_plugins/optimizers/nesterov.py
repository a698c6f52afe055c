"""SGD with Nesterov momentum and a rising momentum coefficient: the baseline of the K-FAC paper.

Source: Sutskever, Martens, Dahl & Hinton, *On the importance of initialization and momentum in deep learning*, ICML
2013, equations 3 to 5; method, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_plugins.optimizers import NesterovConfig
from kfac_plugins.optimizers.gradient import GradientOptimizer
from kfacore.roles import Likelihood, Optimizer, StepReport

__all__ = ["Nesterov", "momentum_coefficient"]


def momentum_coefficient(step: int, mu_max: float) -> float:
    """mu_t = min(1 - 2^(-1 - log2(floor(t/250) + 1)), mu_max) (equation 5).

    Args:
        step: t, from 1.
        mu_max: The largest coefficient.

    Returns:
        1/2 for t < 250, then 3/4, 5/6, 7/8, ... up to mu_max.
    """
    return min(1.0 - math.pow(2.0, -1.0 - math.log2(step // 250 + 1)), mu_max)


class Nesterov(GradientOptimizer):
    """v_t = mu_t v_{t-1} - epsilon grad h(theta_{t-1} + mu_t v_{t-1}),   theta_t = theta_{t-1} + v_t (equations 3, 4).

    Between steps the model holds theta_t, not the point looked ahead to. The loss and error of a report belong to the
    point where the gradient was taken, theta_{t-1} + mu_t v_{t-1}.

    Args:
        model: The model.
        likelihood: The likelihood.
        config: Learning rate and largest momentum.
        weight_decay: eta.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, config: NesterovConfig, weight_decay: float = 0.0
    ) -> None:
        super().__init__(model, likelihood, weight_decay)
        self.config = config
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    @classmethod
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
        """Build it for a run; it draws nothing and uses no other slot."""
        return cls(model, likelihood, config, weight_decay)

    def step(self, inputs: Any, targets: Tensor) -> StepReport:
        """Look ahead, take the gradient there, move."""
        self.steps += 1
        mu, lr = momentum_coefficient(self.steps, self.config.mu_max), self.config.lr
        with torch.no_grad():
            torch._foreach_mul_(self.velocity, mu)
            torch._foreach_add_(self.parameters, self.velocity)
        measured = self.measure(inputs, targets)
        with torch.no_grad():
            # theta_{t-1} + mu v is in place already, so the rest of v_t is all that is missing
            torch._foreach_add_(self.parameters, measured.gradients, alpha=-lr)
            torch._foreach_add_(self.velocity, measured.gradients, alpha=-lr)
        return StepReport(
            step=self.steps,
            batch_size=int(targets.shape[0]),
            loss=measured.loss,
            objective=measured.objective,
            error=measured.error,
            alpha=torch.tensor(lr, dtype=torch.float64),
            mu=torch.tensor(mu, dtype=torch.float64),
        )

    def state_dict(self) -> dict[str, Any]:
        """The velocity and the number of steps."""
        return {"steps": self.steps, "velocity": [v.clone() for v in self.velocity]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`.

        Raises:
            ValueError: It belongs to another model.
        """
        if [v.shape for v in state["velocity"]] != [v.shape for v in self.velocity]:
            raise ValueError("the velocity has other shapes than the model's parameters")
        self.steps = int(state["steps"])
        torch._foreach_copy_(
            self.velocity, [v.to(own) for v, own in zip(state["velocity"], self.velocity, strict=True)]
        )
