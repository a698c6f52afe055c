"""What the benchmarks compare: one training step of each optimizer, on the same model and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.nets import images
from kfacore import KFAC

__all__ = ["APPROXIMATIONS", "DEFAULTS", "PLAIN", "Batches", "Step", "kfac", "kfac_step", "torch_step"]

Step = Callable[[int], None]
"""One training step, given the number of the turn."""

APPROXIMATIONS: dict[str, dict[str, Any]] = {
    "blockdiag": {"kind": "blockdiag"},
    "tridiag, tolerance 0": {"kind": "tridiag", "tolerance": 0.0},
    "tridiag": {"kind": "tridiag"},
    "blockdiag, power 1": {"kind": "blockdiag", "power": 1.0},
    "tridiag, tolerance 0, power 1": {"kind": "tridiag", "tolerance": 0.0, "power": 1.0},
    "tridiag, power 1": {"kind": "tridiag", "power": 1.0},
}
"""Contenders by name; what a name does not say is as in the preset ``default``."""

DEFAULTS = ["blockdiag", "tridiag, tolerance 0", "tridiag"]
"""Those that temper their factors, as the preset does."""

PLAIN = ["blockdiag, power 1", "tridiag, tolerance 0, power 1"]
"""The paper's own inverses."""


class Batches:
    """Twenty batches of images, drawn once, handed out in turn."""

    def __init__(self, device: torch.device, cases: int) -> None:
        data = images(device)
        order = torch.Generator().manual_seed(0)
        self._batches = [data[torch.randperm(len(data), generator=order)[:cases].to(device)] for _ in range(20)]

    def __call__(self, turn: int) -> Tensor:
        """(cases, 784)."""
        return self._batches[turn % len(self._batches)]


def torch_step(model: nn.Module, batches: Callable[[int], Tensor], name: str) -> Step:
    """Torch's ``sgd`` with momentum or ``adam``, on the Bernoulli negative log-likelihood."""
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run(turn: int) -> None:
        x = batches(turn)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="none").sum(1).mean()
        loss.backward()
        optimizer.step()

    return run


def kfac(
    model: nn.Module,
    approx: dict[str, Any],
    *,
    gamma: str = "tied",
    refresh_every: int = 20,
    refresh: str = "inline",
    tau2: float = 0.25,
) -> KFAC:
    """The default preset in its steady state: tau_1 = 1/8, T_1 = 5, a refresh every T_3 steps; the paper's tau_2."""
    return KFAC(
        model,
        likelihood="bernoulli",
        # Of every approximation in the same steps, whatever a refresh costs it.
        approx={
            **approx,
            "refresh_every": refresh_every,
            "refresh_growth": None,
            "refresh_share": None,
            "refresh": refresh,
        },
        estimator={"kind": "monte-carlo", "tau1": 0.125, "min_cases": 1},
        trust={"kind": "undo", "settling": 1},  # the steady state: asked about where lambda adapts
        damping={"kind": "levenberg-marquardt", "gamma_rule": gamma},
        momentum={"kind": "quadratic-model", "tau2": tau2, "min_cases": 1},
    )


def kfac_step(optimizer: KFAC, batches: Callable[[int], Tensor]) -> Step:
    """One step of an autoencoder."""

    def run(turn: int) -> None:
        x = batches(turn)
        optimizer.step(x, x)

    return run
