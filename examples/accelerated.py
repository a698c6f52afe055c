"""A plain loop with accelerate: accumulation, clipping, a schedule, a saved state: AdamW with and without curvature."""

from __future__ import annotations

from contextlib import nullcontext
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfacore import Preconditioned


def teacher(cases: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    W, V = torch.randn(20, 30, generator=generator), torch.randn(30, 5, generator=generator)
    x = torch.randn(cases, 20, generator=generator) * torch.logspace(-1.5, 0.5, 20)
    return TensorDataset(x, (torch.tanh(x @ W) @ V).argmax(1))


def train(wrapped: bool, steps: int, folder: str, *, resume: bool = False) -> float:
    """Loss on fresh examples after steps of two micro-batches each; or after going on from the state half-way."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guest = Preconditioned(model, base, likelihood="categorical") if wrapped else None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(guest or base, steps)
    data = TensorDataset(*teacher(128 * steps + 2000)[:-2000])
    model, opt, loader, schedule = accelerator.prepare(model, guest or base, DataLoader(data, 64), schedule)
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, steps // 2 * 2)
    for part, (x, y) in enumerate(loader, start=steps // 2 * 2 + 1 if resume else 1):
        with accelerator.accumulate(model):
            with guest.watch() if guest else nullcontext():  # does nothing when no statistics are due
                z = model(x)
                guest.observe(z) if guest else None
            accelerator.backward(nn.functional.cross_entropy(z, y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0) if accelerator.sync_gradients else None
            opt.step(), schedule.step(), opt.zero_grad()
        if part == steps // 2 * 2:
            accelerator.save_state(folder)
    with torch.no_grad():
        x, y = teacher(128 * steps + 2000)[-2000:]
        return nn.functional.cross_entropy(model(x), y).item()


def main(steps: int = 200) -> tuple[float, float]:
    with TemporaryDirectory() as alone, TemporaryDirectory() as folder:
        plain, guest = train(False, steps, alone), train(True, steps, folder)
        again = train(True, steps, folder, resume=True)
    print(f"AdamW {plain:.3f}, with K-FAC's directions {guest:.3f}; resumed half-way {again:.3f}")
    return plain, guest


if __name__ == "__main__":
    main()
