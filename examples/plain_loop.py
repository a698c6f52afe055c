"""A plain loop with gradient accumulation, a schedule and clipping: AdamW alone, then with K-FAC's directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfacore import Preconditioned


def teacher(cases: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of uneven scale and the classes that a fixed random net gives them."""
    generator = torch.Generator().manual_seed(0)
    W, V = torch.randn(20, 30, generator=generator), torch.randn(30, 5, generator=generator)
    x = torch.randn(cases, 20, generator=generator.manual_seed(seed)) * torch.logspace(-1.5, 0.5, 20)
    return x, (torch.tanh(x @ W) @ V).argmax(1)


def train(wrapped: bool, steps: int = 200) -> float:
    """Loss on fresh examples after some steps of four micro-batches each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guest = Preconditioned(model, optimizer, likelihood="categorical") if wrapped else None
    optimizer = guest or optimizer
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = teacher(128, seed=step + 2)
        for part, target in zip(x.split(32), y.split(32), strict=True):
            if guest is None:
                z = model(part)
            else:
                with guest.watch():  # does nothing when no statistics are due
                    z = model(part)
                    guest.observe(z)
            (nn.functional.cross_entropy(z, target) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    x, y = teacher(2000, seed=1)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y).item()


def main(steps: int = 200) -> tuple[float, float]:
    alone, guest = train(False, steps), train(True, steps)
    print(f"AdamW {alone:.3f}, with K-FAC's directions {guest:.3f}")
    return alone, guest


if __name__ == "__main__":
    main()
