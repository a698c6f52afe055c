"""Muon (Jordan et al. 2024) as in `torch.optim.Muon`, but orthogonalising in the parameters' own precision.

Torch's rounds to bfloat16, which processors without such arithmetic emulate: on one of them its step took 0.3 seconds
on a net of 64-256-256-10, 25 times as long as here. It would be beaten by its number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "MuonAndAdamW", "orthogonalised"]

_COEFFICIENTS = 3.4445, -4.775, 2.0315
_ITERATIONS = 5
_BETAS, _EPS = (0.9, 0.999), 1e-8


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices, each step as large as one of AdamW with the same rate.

    Args:
        matrices: Parameters of two dimensions or more; kernels of convolutions are taken as (outputs, the rest).
        lr: The learning rate.
        momentum: Share of the momentum that stays.
        weight_decay: Share of a weight, times lr, that a step takes away (decoupled, Loshchilov & Hutter 2019).
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # there is no closure
        """One step along the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1)
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        step = orthogonalised(ahead).view_as(weight)
        weight.sub_(step, alpha=group["lr"] * 0.2 * max(ahead.shape) ** 0.5)


class MuonAndAdamW(Muon):
    """Muon for matrices and, in the same optimizer, AdamW for the rest, with one rate for both.

    Args:
        matrices: As `Muon` takes them.
        rest: Biases, norms and embeddings.
        lr: The learning rate of both.
        momentum: Muon's.
        weight_decay: Of both.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, lr, momentum, weight_decay)
        rest = list(rest)
        for group in self.param_groups:
            group["adamw"] = False
        if rest:
            self.add_param_group({"params": rest, "adamw": True})

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if not group["adamw"]:
            super()._move(weight, gradient, group)
            return
        state = self.state[weight]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        k, (b1, b2) = float(state["step"]), _BETAS
        state["mean"].lerp_(gradient, 1.0 - b1)
        state["square"].mul_(b2).addcmul_(gradient, gradient, value=1.0 - b2)
        scale = (state["square"] / (1.0 - b2**k)).sqrt_().add_(_EPS)
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(state["mean"], scale, value=-group["lr"] / (1.0 - b1**k))


def orthogonalised(
    matrix: Tensor,  # (a, b)
) -> Tensor:  # (a, b)
    """Its singular values brought near 1 by five Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
