"""Ordinary steps of whole nets wait for no device: convolutions, batch norm, attention, tied embeddings, guests.

Plain MLPs are in tests/optim/test_step_sync.py. On a CPU the watch sees what would wait on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import zoo_images
import zoo_sequences
from torch import Tensor, nn
from waits import DEVICES, waiting_is_an_error, watch

from kfacore import KFAC, Preconditioned, host
from kfacore.optim import loss as loss_module


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    return zoo_images.LeNet(), *zoo_images.images(channels=1, size=14)


def residual() -> tuple[nn.Module, Tensor, Tensor]:
    return zoo_images.resnet(), *zoo_images.images()


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    x = zoo_sequences.tokens()
    return zoo_sequences.GPT(), x, x.roll(-1, 1)


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    x = zoo_sequences.tokens()
    return zoo_sequences.LSTMClassifier(), x, torch.arange(len(x)) % 3


NETS = [conv, residual, gpt, lstm]
Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _a_cpu_stands_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU numbers are read in every step, since that costs nothing there; here it does as if it did."""
    monkeypatch.setattr(host, "is_free", lambda *tensors: False)
    monkeypatch.setattr(loss_module, "on_host", lambda tensor: False)


def made(make: Make, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = make()
    return model.to(device), x.to(device), y.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", NETS)
def test_an_ordinary_step_of_kfac(device: str, make: Make) -> None:
    model, x, y = made(make, device)
    approx = {"kind": "blockdiag", "refresh_growth": None, "refresh_every": 100}
    optimizer, ordinary = (
        KFAC(
            model, likelihood="categorical", approx=approx, trust={"kind": "undo", "settling": 3, "every_step": False}
        ),
        0,
    )
    for k in range(1, 10):
        if k <= 3 or k % 5 == 0 or optimizer.trust.asks(k) or optimizer.preconditioner.due(k):  # after one undone, too
            optimizer.step(x, y)
            continue
        with waiting_is_an_error(device), watch() as seen:
            optimizer.step(x, y)
        assert dict(seen) == {}, f"step {k} waits for the device: {dict(seen)}"
        ordinary += 1
    assert ordinary >= 2


BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "base", "scale"),
    [(conv, "sgd", "graft"), (residual, "adamw", "kl"), (gpt, "adamw", "graft"), (lstm, "sgd", "none")],
)
def test_an_ordinary_step_of_a_guest(device: str, make: Make, base: str, scale: Any) -> None:
    """From the forward pass to the update, whatever scales the step; what the loop waits for without it is its own.

    An LSTM of cuDNN reads a seed back in some of its forward passes.
    """
    model, x, y = made(make, device)
    optimizer = Preconditioned(model, BASES[base](model), likelihood="categorical", every=100, scale=scale)

    def step() -> None:
        optimizer.zero_grad()
        with optimizer.watch():
            z = model(x)
        optimizer.observe(z)
        nn.functional.cross_entropy(z.flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    with watch() as own:
        nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()

    for k in range(1, 7):
        if k <= 3:
            step()
            continue
        with nullcontext() if own else waiting_is_an_error(device), watch() as seen:
            step()
        assert not seen - own, f"step {k} waits for the device: {dict(seen)}"
