"""What takes the steps: K-FAC with nothing set, a guest around AdamW, and AdamW, Muon and SOAP with their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.loops import run_pass
from benchmarks.robust.contenders import Stepped
from kfac_plugins.optimizers.muon import Muon
from kfacore import KFAC, Preconditioned

__all__ = ["METHODS", "RATES", "Method", "start"]

RATES: dict[str, tuple[float, ...]] = {
    "kfac": (),
    "kfac-tridiag": (),
    "guest": (1e-3, 2e-3, 4e-3, 8e-3),
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "muon": (2e-3, 5e-3, 1e-2, 2e-2),
    "soap": (1e-3, 3e-3, 6e-3, 1e-2),
}
"""Learning rates to choose among; K-FAC has none. The guest takes that of AdamW, see `benchmarks.real.race`."""

METHODS = tuple(RATES)

_WARM = 0.1
"""Share of the budget in which the rate rises."""


@dataclass(frozen=True)
class Method:
    """A method under way.

    Attributes:
        step: One step on inputs and targets.
        schedule: Told before each step which share of the budget is spent.
    """

    step: Callable[[Tensor, Tensor], Stepped]
    schedule: Callable[[float], None]


def start(name: str, model: nn.Module, rate: float | None) -> Method:
    """A method before its first step.

    Args:
        name: One of `METHODS`.
        model: Trained in place.
        rate: Largest learning rate, None for K-FAC.
    """
    if rate is None:
        kfac = KFAC(model, likelihood="categorical", approx="tridiag" if name == "kfac-tridiag" else "blockdiag")
        return Method(lambda x, y: _stepped(kfac, x, y), lambda share: None)
    if name == "guest":
        base = Preconditioned(model, _adamw(list(model.parameters()), rate), likelihood="categorical")
        return _descent(model, [base], rate)
    build = {"adamw": _plain, "muon": _muon, "soap": _soap}[name]
    return _descent(model, build(model, rate), rate)


def _stepped(kfac: KFAC, x: Tensor, y: Tensor) -> Stepped:
    report = kfac.step(x, y)
    return Stepped(float(report.loss), bool(report.accepted))


def _descent(model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float) -> Method:
    """A user's loop with one cycle of the learning rate over the budget, up along a line, then down along a cosine."""

    def step(x: Tensor, y: Tensor) -> Stepped:
        loss = run_pass(model, optimizers[0], x, y)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return Stepped(float(loss))

    def schedule(share: float) -> None:
        factor = share / _WARM if share < _WARM else 0.5 + 0.5 * math.cos(math.pi * (share - _WARM) / (1.0 - _WARM))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * max(factor, 0.02)

    return Method(step, schedule)


def _adamw(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """As `benchmarks.loops` has it for its GPT."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.1)


def _plain(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    return [_adamw(list(model.parameters()), rate)]


def _muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and kernels, AdamW for embeddings, the head, biases and norms, as its author has it."""
    ends = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_submodule("head")
    ends |= {id(p) for p in head.parameters()}
    inner = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in ends]
    chosen = {id(p) for p in inner}
    return [Muon(inner, lr=rate), _adamw([p for p in model.parameters() if id(p) not in chosen], rate)]


def _soap(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Sides above 1,024, those of a vocabulary, keep no factor: the eigenvectors of one would take the whole budget."""
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=rate, weight_decay=0.01, max_precondition_dim=1024)]
