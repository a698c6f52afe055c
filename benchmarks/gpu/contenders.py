"""One training step of each contender, as its users write it: fused optimizers of torch, K-FAC, K-FAC as a guest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import kfac
from benchmarks.gpu.nets import Task
from kfac_plugins.optimizers.muon import Muon
from kfacore import KFAC, Preconditioned

__all__ = ["CYCLE", "Contender", "first_order", "guest", "own_loop"]

CYCLE = 20
"""Steps from one refresh of `KFAC` to the next."""


@dataclass(frozen=True)
class Contender:
    """Something that trains.

    Attributes:
        name: For tables.
        start: Builds net and optimizer and returns one step, given the number of the turn.
        cycle: Steps from one refresh to the next.
    """

    name: str
    start: Callable[[Task], Callable[[int], None]]
    cycle: int = CYCLE


def _muon(model: nn.Module, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon on matrices, fused AdamW on the rest and on embeddings, as its author has it."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.dim() == 2]
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in matrices if id(p) not in embedded]
    mine = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in mine]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=1e-4, fused=True)]
    if matrices:
        fast = getattr(torch.optim, "Muon", None) if device.type == "cuda" else None
        # Torch's own rounds to bfloat16, which processors emulate: see kfac_plugins/optimizers/muon.py.
        found.append(Muon(matrices, lr=1e-3) if fast is None else fast(matrices, lr=1e-3))
    return found


_MAKERS: dict[str, Callable[[nn.Module, torch.device], list[torch.optim.Optimizer]]] = {
    "SGD, fused": lambda model, _: [torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)],
    "AdamW, fused": lambda model, _: [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)],
    "Muon": _muon,
}


def first_order(name: str) -> Contender:
    """An optimizer of torch in a plain loop."""

    def start(task: Task) -> Callable[[int], None]:
        model = task.build()
        optimizers = _MAKERS[name](model, task.device)

        def step(_: int) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            with task.autocast():
                loss = task.loss(model(task.inputs))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        return step

    return Contender(name, start)


def guest(base: str, name: str, *, cycle: int = 10, **options: Any) -> Contender:
    """K-FAC around an optimizer of torch."""

    def start(task: Task) -> Callable[[int], None]:
        model = task.build()
        (inner,) = _MAKERS[base](model, task.device)
        optimizer = Preconditioned(model, inner, likelihood=task.likelihood, every=cycle, **options)

        def step(_: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            with task.autocast():
                with optimizer.watch():
                    z = model(task.inputs)
                optimizer.observe(z)
                loss = task.loss(z)
            loss.backward()
            optimizer.step()

        return step

    return Contender(name, start, cycle)


def own_loop(name: str, approx: dict[str, Any], refresh: str = "inline") -> Contender:
    """`KFAC` in its steady state: tau_1 = 1/8, tau_2 = 1/4, lambda every 5 steps, a refresh every 20."""

    def start(task: Task) -> Callable[[int], None]:
        if task.likelihood == "bernoulli":
            optimizer = kfac(task.build(), approx, refresh=refresh)
        else:
            optimizer = _classifier(task, approx, refresh)

        def step(_: int) -> None:
            optimizer.step(task.inputs, task.targets)

        return step

    return Contender(name, start)


def _classifier(task: Task, approx: dict[str, Any], refresh: str) -> KFAC:
    return KFAC(
        task.build(),
        likelihood=task.likelihood,
        approx={**approx, "refresh_every": CYCLE, "refresh_growth": None, "refresh_share": None, "refresh": refresh},
        estimator={"kind": "monte-carlo", "tau1": 0.125, "min_cases": 1},
        trust={"kind": "undo", "settling": 1},
        momentum={"kind": "quadratic-model", "tau2": 0.25, "min_cases": 1},
        autocast="bfloat16" if task.low else None,
    )
