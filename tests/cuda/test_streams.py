"""A refresh on a stream of its own: whatever else the device is busy with, the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from waits import DEVICES

from kfacore import KFAC

EXACT = {"kind": "exact", "tau1": 1.0}


def trained(device: str, *, busy: bool, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4)).double()
    approx = {"kind": "tridiag", "refresh": "background", "refresh_every": 5, "refresh_growth": None}
    optimizer = KFAC(model.to(device), likelihood="categorical", approx={**approx, "refresh_delay": 3}, estimator=EXACT)
    generator, work = torch.Generator().manual_seed(1), torch.rand(400, 400, device=device)
    for _ in range(18):
        x = torch.randn(64, 20, generator=generator, dtype=torch.float64).to(device)
        y = torch.randint(4, (64,), generator=generator).to(device)
        for _ in range(20 if busy else 0):  # keeps the default stream behind the host, and frees memory meanwhile
            work = torch.tanh(work @ work)
        optimizer.step(x, y)
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
def test_a_busy_device_changes_nothing(device: str) -> None:
    quiet = trained(device, busy=False)
    for _ in range(3 if device != "cpu" else 1):
        assert all(torch.equal(a, b) for a, b in zip(quiet, trained(device, busy=True), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_numbers_are_those_of_the_cpu(device: str) -> None:
    for a, b in zip(trained("cpu", busy=False), trained(device, busy=True), strict=True):
        assert float((a - b).norm()) <= 1e-7 * float(a.norm())


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "cpu"])
def test_steps_on_a_stream_of_the_users(device: str) -> None:
    """What the loop's own stream is, is the loop's affair."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = trained(device, busy=True)
    assert all(torch.equal(a, b) for a, b in zip(trained(device, busy=False), found, strict=True))
