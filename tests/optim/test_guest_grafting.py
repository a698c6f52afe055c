"""What a guest makes of the base's step: lengths, decay, momentum, trust region, against the formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest, mlp
from torch import Tensor, nn

from kfacore import Preconditioned

BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "ascent": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def blocks(opt: Preconditioned, values: list[Tensor]) -> list[Tensor]:
    """Values of all parameters as matrices [W b]."""
    own = dict(zip(opt.network.model.parameters(), values, strict=True))
    return [torch.cat([own[b.parameters[0]], own[b.parameters[1]][:, None]], 1) for b in opt.network.layers]


@pytest.mark.parametrize("kind", BASES)
def test_a_grafted_step_has_the_bases_length_and_kfacs_direction(kind: str) -> None:
    model = mlp()
    opt = guest(model, BASES[kind](model.parameters()), estimator=EXACT)
    for step in range(3):
        twin, base = copy.deepcopy((model, opt.base))
        start = parameters(model)
        x, y = data(seed=step)
        opt.zero_grad()
        backward(opt, model, x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        base.step()
        opt.step()
        group, lr = opt.param_groups[0], opt.param_groups[0]["lr"]
        kept = [p * (1 - lr * group["weight_decay"]) if kind == "adamw" else p for p in start]
        own = [b - a for a, b in zip(kept, parameters(twin), strict=True)]
        taken = [b - a for a, b in zip(kept, parameters(model), strict=True)]
        means = []
        for p, old in zip(model.parameters(), start, strict=True):
            assert p.grad is not None
            state = opt.state[p]
            g = (-1 if group["maximize"] else 1) * p.grad
            g = g + (0 if kind == "adamw" else group["weight_decay"]) * old
            if "exp_avg" in state:
                g = state["exp_avg"]
            elif isinstance(opt.base, torch.optim.SGD) and group["momentum"]:
                m = state["momentum_buffer"]
                g = g + group["momentum"] * m if group["nesterov"] else m
            means.append(g)
        assert opt.curvature is not None
        wanted = opt.curvature.preconditioner.solve(blocks(opt, means))
        for s, delta, d in zip(blocks(opt, own), blocks(opt, taken), wanted, strict=True):
            assert torch.allclose(delta, -s.norm() * d / d.norm(), atol=1e-12)


@pytest.mark.parametrize("kind", [name for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)])
def test_decay_is_known_to_be_decoupled(kind: str) -> None:
    """Of the base's step and the direction, the decay is in neither: with a gradient of zero it alone is left."""
    moves = []
    for decay in (0.0, 0.5):
        model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))
        for seed, layer in enumerate((model[0], model[2])):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        opt = guest(model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, weight_decay=decay), estimator=EXACT)
        start = parameters(model)
        backward(opt, model, *data(dtype=torch.float32))
        opt.step()
        moves.append([b - (1 - 0.1 * decay) * a for a, b in zip(start, parameters(model), strict=True)])
    for a, b in zip(*moves, strict=True):
        cosine = nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-5)
        if kind == "Muon":  # the size of Adafactor's own step depends on the parameters'
            assert torch.allclose(a, b, atol=1e-5)


def test_kl_shortens_to_the_trust_region() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2:].parameters()}]
    opt = guest(model, torch.optim.SGD(groups, lr=0.5), estimator=EXACT, scale="kl", kappa=1e-4)
    x, y = data()
    backward(opt, model, x, y)
    start = parameters(model)
    opt.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert opt.curvature is not None
    solved = opt.curvature.preconditioner.solve(blocks(opt, gradients))
    rates = [0.3, 0.5, 0.5]
    total = sum(r * r * float((d * g).sum()) for r, d, g in zip(rates, solved, blocks(opt, gradients), strict=True))
    nu = min(1.0, (1e-4 / total) ** 0.5)
    assert nu < 1
    moved = [b - a for a, b in zip(start, parameters(model), strict=True)]
    for delta, r, d in zip(blocks(opt, moved), rates, solved, strict=True):
        assert torch.allclose(delta, -r * nu * d, atol=1e-12)


def test_parameters_without_a_product_are_the_bases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    base = torch.optim.AdamW(twin.parameters(), lr=0.1)
    backward(opt, model, *data())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    opt.step()
    base.step()
    assert torch.equal(model[1].weight, twin[1].weight)
    assert torch.equal(model[1].bias, twin[1].bias)
    assert not torch.equal(model[0].weight, twin[0].weight)


def test_frozen_blocks_are_left_alone_and_unfrozen_ones_found() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [block.info.name for block in opt.network.layers] == ["2", "4"]
    first = model[0].weight.detach().clone()
    for step in range(4):
        opt.zero_grad()
        backward(opt, model, *data(seed=step))
        opt.step()
    assert torch.equal(model[0].weight, first)
    model[4].requires_grad_(False)
    last = model[4].weight.detach().clone()
    opt.zero_grad()
    backward(opt, model, *data(seed=5))
    opt.step()
    assert torch.equal(model[4].weight, last)
    assert "4.weight: K-FAC, block 4 (kron, 3 x 7); frozen, left alone" in opt.explain()
    model.requires_grad_(True)
    opt.zero_grad()
    with pytest.warns(UserWarning, match="unfrozen or added: the blocks were found anew"):
        backward(opt, model, *data(seed=6))
    opt.step()
    assert [block.info.name for block in opt.network.layers] == ["0", "2", "4"]
    assert not torch.equal(model[0].weight, first)


def test_added_groups_are_found() -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model[:3].parameters(), lr=0.1))
    opt.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    backward(opt, model, *data())
    opt.step()
    assert [block.info.name for block in opt.network.layers] == ["0", "2", "4"]


def test_several_optimizers_on_one_model() -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model[:3].parameters(), lr=0.1))
    other = guest(model, torch.optim.AdamW(model[4].parameters(), lr=0.01), seed=1)
    start = parameters(model)
    x, y = data()
    with opt.watch(), other.watch():
        z = model(x)
    opt.observe(z)
    other.observe(z)
    nn.functional.cross_entropy(z, y).backward()
    opt.step()
    assert torch.equal(model[4].weight, start[4])
    other.step()
    assert not torch.equal(model[4].weight, start[4])
    assert "4.weight: not this optimizer's" in opt.explain()
