"""A CNN with batch norm, SGD with momentum and a one-cycle schedule: the same loop with and without curvature."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kfacore import Preconditioned


def pictures(cases: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy 16 x 16 gratings; the class is the direction, one of eight."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 8, (cases,), generator=generator)
    angle, phase = y * math.pi / 8, torch.rand(cases, generator=generator) * 6.3
    u, v = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = u * angle.cos().view(-1, 1, 1) + v * angle.sin().view(-1, 1, 1)
    x = torch.sin(0.9 * along + phase.view(-1, 1, 1)) + 1.5 * torch.randn(cases, 16, 16, generator=generator)
    return x.unsqueeze(1), y


def net() -> nn.Sequential:
    """Two convolutions with norms of the batch."""
    first = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(24, 8))


def train(wrapped: bool, steps: int = 150) -> float:
    torch.manual_seed(0)
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    optimizer = Preconditioned(model, base, likelihood="categorical") if wrapped else base
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for step in range(steps):
        x, y = pictures(64, seed=step + 1)
        with optimizer.watch() if isinstance(optimizer, Preconditioned) else nullcontext():
            z = model(x)
        if isinstance(optimizer, Preconditioned):
            optimizer.observe(z)
        nn.functional.cross_entropy(z, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    x, y = pictures(1000, seed=0)
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(x), y).item()


def main(steps: int = 150) -> tuple[float, float]:
    losses = train(False, steps), train(True, steps)
    print("SGD {:.3f}, with K-FAC's directions {:.3f}".format(*losses))
    return losses


if __name__ == "__main__":
    main()
