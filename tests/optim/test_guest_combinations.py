"""Random combinations of a guest's options on one small net: each trains, and nothing that is not its own moves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from guests import data, guest
from torch import nn

CHOICES: dict[str, list[Any]] = {
    "approx": ["blockdiag", "tridiag", "diagonal", "exact", {"kind": "tridiag", "power": 0.7}],
    "estimator": ["monte-carlo", "exact", "empirical", {"kind": "monte-carlo", "tau1": 0.5}],
    "scale": ["graft", "kl", "none"],
    "rest": ["base", "diagonal"],
    "every": [1, 2, 10],
    "damping": [0.03, 0.1, 1.0],
    "sizes": [(12,), (5, 7), (1, 4, 2, 3, 2)],
    "base": ["SGD", "AdamW", "RMSprop"],
}


def drawn(seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    return {name: chance.choice(values) for name, values in CHOICES.items()}


@pytest.mark.parametrize("seed", range(30))
def test_any_combination_trains_and_leaves_the_rest_alone(seed: int) -> None:
    options = drawn(seed)
    sizes, base = list(options.pop("sizes")), options.pop("base")
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 3)
    )
    model[1].bias.requires_grad_(False)
    mine = [p for i in (0, 1, 3) for p in model[i].parameters()]  # the head is not the optimizer's
    opt = guest(model, getattr(torch.optim, base)(mine, lr=0.01), **options)
    others = [p for p in model.parameters() if not p.requires_grad or all(p is not q for q in mine)]
    before = [p.detach().clone() for p in others]
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        x, y = data(seed=step, dtype=torch.float32)
        opt.zero_grad()
        for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
            with opt.watch():
                z = model(part)
                opt.observe(z, target)
            loss = nn.functional.cross_entropy(z, target, reduction="sum") / len(y)
            loss.backward()
            assert torch.isfinite(loss)
        opt.step()
    assert opt.steps == 3
    assert opt.curvature is not None
    assert opt.curvature.preconditioner.inverse is not None
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)]
    assert moved == [p.requires_grad and any(p is q for q in mine) for p in model.parameters()]
