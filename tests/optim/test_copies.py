"""Copies, pickles and states in another precision go on where the original was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC

BACKGROUND = {
    "kind": "blockdiag",
    "refresh": "background",
    "refresh_every": 12,
    "refresh_delay": 8,
    "refresh_growth": None,
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(k: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(k))
    return x, x[:, :3].argmax(1)


def through_file(optimizer: KFAC) -> KFAC:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded: KFAC = torch.load(file, weights_only=False)
    return loaded


WAYS: dict[str, Callable[[KFAC], KFAC]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),  # its own bytes
    "torch.save": through_file,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 1, 14])
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag", BACKGROUND], ids=["blockdiag", "tridiag", "background"])
def test_a_copy_goes_on_bit_for_bit_with_a_model_of_its_own(way: str, steps: int, approx: Any) -> None:
    optimizer = KFAC(net(), likelihood=nn.CrossEntropyLoss(), approx=approx, seed=7, weight_decay=1e-3)
    optimizer.register_step_post_hook(lambda *_: None)
    torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(optimizer.model.parameters(), lr=1.0), lambda _: 1.0)
    for k in range(steps):
        optimizer.step(*data(k))
    twin = WAYS[way](optimizer)
    assert twin.model is not optimizer.model
    assert twin.weight_decay == 1e-3
    for k in range(steps, steps + 9):
        assert float(twin.step(*data(k)).objective) == float(optimizer.step(*data(k)).objective)
    pairs = zip(twin.model.parameters(), optimizer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_copy_does_not_touch_the_original() -> None:
    optimizer = KFAC(net(), likelihood="categorical")
    optimizer.step(*data(0))
    before = [p.detach().clone() for p in optimizer.model.parameters()]
    twin = copy.deepcopy(optimizer)
    for k in range(1, 4):
        twin.step(*data(k))
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))
    assert optimizer.steps == 1


def test_model_and_optimizer_copied_together_stay_together() -> None:
    model = net()
    optimizer = KFAC(model, likelihood="categorical")
    optimizer.step(*data(0))
    model_too, twin = copy.deepcopy((model, optimizer))
    assert twin.model is model_too


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag", "diagonal", "exact", BACKGROUND], ids=str)
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=["wider", "narrower"]
)
def test_a_state_goes_on_in_another_precision(approx: Any, saved: torch.dtype, loaded: torch.dtype) -> None:
    """As the advice after a numerical failure wants it."""
    options: dict[str, Any] = {"likelihood": "categorical", "approx": approx, "estimator": "exact"}  # draws differ
    first, second = KFAC(net().to(saved), **options), KFAC(net().to(loaded), **options)
    for k in range(14):
        x, y = data(k)
        first.step(x.to(saved), y)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.damping.gamma.dtype == torch.float64
    for k in range(14, 24):
        x, y = data(k)
        a, b = float(first.step(x.to(saved), y).loss), float(second.step(x.to(loaded), y).loss)
        assert a == pytest.approx(b, rel=1e-3)
