"""The optimizers of the race behind one method: K-FAC with nothing set, and what else people use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.robust.task import Task, net
from kfac_plugins.optimizers.muon import Muon
from kfacore import KFAC
from kfacore.registry import get_registry
from kfacore.roles import Likelihood

__all__ = ["CONTENDERS", "FAMILIES", "Stepped", "Stepper", "choose_contenders", "family", "missing", "start", "warm_up"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "kfac": ("blockdiag", "tridiag"),
    "adam": ("0.0003", "0.001", "0.003", "0.01"),
    "muon": ("0.003", "0.01", "0.03"),
    "soap": ("0.003", "0.01", "0.03"),
}
"""K-FAC's approximations, the others' learning rates; of several rates the best on a problem counts."""

CONTENDERS = [f"{name}:{choice}" for name, choices in FAMILIES.items() for choice in choices]


@dataclass(frozen=True)
class Stepped:
    """What is known of one step.

    Attributes:
        loss: Mean negative log-likelihood of the mini-batch before the step.
        accepted: Whether the step was kept; optimizers that undo none keep all.
    """

    loss: float
    accepted: bool = True


Stepper = Callable[[Tensor, Tensor], Stepped]
"""One step on a mini-batch of inputs and targets."""


def family(contender: str) -> str:
    """What comes before the colon."""
    return contender.partition(":")[0]


def choose_contenders(names: list[str] | None, *, only_kfac: bool = False) -> list[str]:
    """Those of these names and families, in the order in which they are run.

    Raises:
        ValueError: A name is neither.
    """
    unknown = [name for name in names or () if name not in CONTENDERS and name not in FAMILIES]
    if unknown:
        known = ", ".join((*FAMILIES, *CONTENDERS))
        raise ValueError(f"no contender is called {', '.join(unknown)}; there are {known}")
    chosen = [name for name in CONTENDERS if not names or name in names or family(name) in names]
    return [name for name in chosen if not only_kfac or family(name) == "kfac"]


def missing(contender: str) -> str | None:
    """Why a contender cannot run here, or nothing."""
    if family(contender) == "soap" and find_spec("pytorch_optimizer") is None:
        return "the package pytorch_optimizer is not installed"
    return None


def start(contender: str, model: nn.Module, likelihood: str) -> Stepper:
    """A contender at the start of a run, ready to step."""
    name, _, choice = contender.partition(":")
    if name == "kfac":
        return _kfac(KFAC(model, likelihood=likelihood, approx=choice))
    optimizers = {"adam": _adam, "muon": _muon, "soap": _soap}[name](model, float(choice))
    return _gradient_descent(model, get_registry().build("likelihood", likelihood), optimizers)


def warm_up(contender: str) -> None:
    """Two steps on next to nothing: what only a process's first steps cost, imports above all, is not the race's."""
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    task = Task(net((3, 4, 3), "tanh", 0), x, x, x, x, "gaussian", 8)
    step = start(contender, task.model, task.likelihood)
    for _ in range(2):
        step(task.x, task.y)


def _kfac(optimizer: KFAC) -> Stepper:
    def step(x: Tensor, y: Tensor) -> Stepped:
        report = optimizer.step(x, y)
        return Stepped(float(report.loss), bool(getattr(report, "accepted", True)))

    return step


def _gradient_descent(model: nn.Module, likelihood: Likelihood, optimizers: list[torch.optim.Optimizer]) -> Stepper:
    def step(x: Tensor, y: Tensor) -> Stepped:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = likelihood.nll(model(x), y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        return Stepped(float(loss.detach()))

    return step


def _adam(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=rate)]


def _muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for biases; Muon's steps scaled to the size of AdamW's, so that one rate does for both.

    Nobody's weights decay.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return [Muon(matrices, lr=rate), torch.optim.AdamW(rest, lr=rate, weight_decay=0.0)]


def _soap(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=rate, weight_decay=0.0)]
