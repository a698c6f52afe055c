"""States saved on one device and taken up on another: in double precision with exact statistics the run goes on as it
would have, and draws of another generator begin anew.
"""  # noqa: D205, RUF100

from __future__ import annotations

import copy
import io
from typing import Any

import guests
import pytest
import torch
from torch import Tensor, nn
from waits import DEVICES

from kfacore import KFAC, host

EXACT = {"kind": "exact", "tau1": 1.0}
CROSSINGS = [(a, b) for a in DEVICES for b in DEVICES]


@pytest.fixture(autouse=True)
def _a_cpu_decides_as_devices_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU trust looks at every step, which on a device would be a wait: small mini-batches would part there."""
    monkeypatch.setattr(host, "is_free", lambda value: False)


def carried(state: Any) -> Any:
    """Through a file, as a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def kfac(model: nn.Module, **options: Any) -> KFAC:
    approx = {"kind": "tridiag", **options.pop("approx", {})}
    return KFAC(model, likelihood="categorical", approx=approx, **{"estimator": EXACT, **options})


def steps(optimizer: KFAC, device: str, first: int, last: int) -> list[Tensor]:
    for step in range(first, last):
        x, y = guests.data(seed=step)
        optimizer.step(x.to(device), y.to(device))
    return [p.detach().cpu() for p in optimizer.model.parameters()]


@pytest.mark.parametrize(("before", "after"), CROSSINGS)
@pytest.mark.parametrize("refresh", ["inline", "background"])
def test_kfac_goes_on_elsewhere(before: str, after: str, refresh: str) -> None:
    """Saved between a refresh's start and its end where it is in the background."""
    options = {"approx": {"refresh": refresh, "refresh_every": 4, "refresh_delay": 2, "refresh_growth": None}}
    first = kfac(guests.mlp().to(before), **options)
    steps(first, before, 0, 9)
    second = kfac(copy.deepcopy(first.model).to(after), **options)
    second.load_state_dict(carried(first.state_dict()))
    assert second._directions.delta is not None
    assert second._directions.delta.flat.device.type == after
    wanted, found = steps(first, before, 9, 15), steps(second, after, 9, 15)
    for a, b in zip(wanted, found, strict=True):
        assert float((a - b).norm()) <= 1e-8 * float(a.norm())


@pytest.mark.parametrize(("before", "after"), CROSSINGS)
def test_a_guest_goes_on_elsewhere(before: str, after: str) -> None:
    def made(model: nn.Module) -> Any:
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return guests.guest(model, base, estimator=EXACT, every=4)

    def run(optimizer: Any, model: nn.Module, device: str, first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            x, y = guests.data(seed=step)
            optimizer.zero_grad()
            guests.backward(optimizer, model, x.to(device), y.to(device))
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    model = guests.mlp().to(before)
    first = made(model)
    run(first, model, before, 0, 6)
    twin = copy.deepcopy(model).to(after)
    second = made(twin)
    second.load_state_dict(carried(first.state_dict()))
    wanted, found = run(first, model, before, 6, 12), run(second, twin, after, 6, 12)
    for a, b in zip(wanted, found, strict=True):
        assert float((a - b).norm()) <= 1e-8 * float(a.norm())


@pytest.mark.parametrize(("before", "after"), CROSSINGS)
def test_draws_on_another_kind_of_device_are_the_same_each_time(before: str, after: str) -> None:
    first = kfac(guests.mlp().to(before), estimator="monte-carlo")
    steps(first, before, 0, 5)
    state = carried(first.state_dict())
    runs = []
    for _ in range(2):
        second = kfac(copy.deepcopy(first.model).to(after), estimator="monte-carlo")
        second.load_state_dict(state)
        runs.append(steps(second, after, 5, 9))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
