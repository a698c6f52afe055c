"""A guest in small loops: nets, data and steps that the tests of `Preconditioned` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore import Preconditioned

EXACT = {"kind": "exact", "tau1": 1.0}


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(n: int = 12, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (n,), generator=generator)


def guest(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> Preconditioned:
    base = base or torch.optim.SGD(model.parameters(), lr=1.0)
    return Preconditioned(model, base, **{"likelihood": "categorical", **options})


def backward(opt: Preconditioned, model: nn.Module, x: Tensor, y: Tensor, sizes: Sequence[int] = ()) -> None:
    """Gradients of the mean loss over all cases, in micro-batches."""
    for part, target in zip(x.split(list(sizes) or len(x)), y.split(list(sizes) or len(y)), strict=True):
        with opt.watch():
            z = model(part)
            if opt.loss is not None:
                opt.observe(z)
        loss = nn.functional.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="sum") / y.numel()
        loss.backward()


def run(opt: Preconditioned, model: nn.Module, steps: int, **given: Any) -> list[Tensor]:
    """Some steps on other data each; the parameters after them."""
    for step in range(steps):
        x, y = data(seed=step + 1, dtype=next(model.parameters()).dtype)
        opt.zero_grad()
        backward(opt, model, x, y, **given)
        opt.step()
    return [p.detach().clone() for p in model.parameters()]
