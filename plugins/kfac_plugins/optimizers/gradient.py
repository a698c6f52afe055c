"""What the gradient methods share: the objective of a mini-batch and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.optim.loss import Loss
from kfacore.roles import Likelihood, Optimizer

__all__ = ["GradientOptimizer", "Objective"]


@dataclass(frozen=True)
class Objective:
    """A mini-batch at the current parameters.

    Attributes:
        loss: Mean negative log-likelihood, ().
        objective: h = loss + (eta/2) ||theta||^2, ().
        error: Mean error, ().
        gradients: Of h by each parameter, weight decay included.
    """

    loss: Tensor
    objective: Tensor
    error: Tensor
    gradients: list[Tensor]


class GradientOptimizer(Optimizer):
    """Base of optimizers that need nothing but the gradient of h (method, section 1).

    Args:
        model: The model.
        likelihood: The likelihood.
        weight_decay: eta.

    Attributes:
        parameters: The trainable parameters.
        steps: Steps taken.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, weight_decay: float) -> None:
        self.model = model
        self.likelihood = likelihood
        self.loss = Loss(likelihood)
        self.weight_decay = weight_decay
        self.parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.steps = 0

    def outputs(self, inputs: Any, targets: Tensor) -> Tensor:
        """The forward pass whose outputs are differentiated."""
        z: Tensor = self.model(inputs)
        return z

    def measure(self, inputs: Any, targets: Tensor) -> Objective:
        """Forward and backward on a mini-batch.

        Args:
            inputs: The model's inputs.
            targets: The targets.
        """
        z = self.outputs(inputs, targets)
        bound = self.loss.bind([z.detach()], targets, step=self.steps + 1)
        if bound.plain:
            loss, error = self.likelihood.nll(z, bound.y).mean(), self.likelihood.error(z.detach(), bound.y).mean()
        else:
            loss, error = (value.to(z.dtype) for value in bound.value([z]))
        gradients = list(torch.autograd.grad(loss, self.parameters))
        with torch.no_grad():
            torch._foreach_add_(gradients, self.parameters, alpha=self.weight_decay)
            squares = torch.stack(torch._foreach_norm(self.parameters)).square().sum()
            loss, error = loss.detach(), error.detach()
        return Objective(loss, loss + 0.5 * self.weight_decay * squares, error, gradients)
