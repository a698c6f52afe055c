"""Mixed precision on the device: bfloat16 in both optimizers, float16 with a scaler around a guest."""

from __future__ import annotations

import guests
import pytest
import torch
from torch import nn
from waits import DEVICES

from kfacore import KFAC


def problem(device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 16, generator=generator)
    return model.to(device), x.to(device), x[:, :4].argmax(1).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_kfac_trains_in_bfloat16(device: str) -> None:
    model, x, y = problem(device)
    optimizer = KFAC(model, likelihood="categorical", approx="blockdiag", autocast="bfloat16")
    losses = [float(optimizer.step(x, y).loss) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_a_guest_trains_in_half_precision(device: str, low: torch.dtype) -> None:
    """With a scaler, as loops in float16 have one; K-FAC's part is in float32."""
    model, x, y = problem(device)
    optimizer = guests.guest(model, torch.optim.AdamW(model.parameters(), lr=1e-2), every=5)
    scaler = torch.amp.GradScaler(device, enabled=low == torch.float16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(device, low):
            with optimizer.watch():
                z = model(x)
            optimizer.observe(z)
            loss = nn.functional.cross_entropy(z, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
