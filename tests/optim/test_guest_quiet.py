"""What is the user's with a guest and without one: gradients, hooks, generators, buffers, modes, modules; all equal."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from guests import data, guest
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

OF_THE_DATA = "ignore:Full backward hook is firing when gradients are computed:UserWarning"
DEPRECATED = "ignore:Using a non-full backward hook:FutureWarning"


class Rounded(torch.autograd.Function):
    """Draws in its backward pass, as stochastic rounding does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * (1.0 + 0.01 * torch.randn_like(g[0]))


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)  # type: ignore[no-any-return,no-untyped-call]  # torch has no types here


class Checkpointed(nn.Sequential):
    """Runs again in every backward pass, with the norm's averages."""

    def __init__(self, reentrant: bool, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Counted(nn.Module):
    """Replaces a buffer in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


def build(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = [
        nn.Linear(8, 8), nn.BatchNorm1d(8), Counted(), nn.Softplus(), nn.Dropout(0.5), nn.Linear(8, 8),
    ]  # fmt: skip
    middle: nn.Module = nn.Sequential(*parts, Rounding())
    if kind != "plain":
        middle = Checkpointed(kind == "reentrant", *parts)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), middle, nn.LayerNorm(8), nn.Linear(8, 3))


def hook(model: nn.Module, hits: Counter[str]) -> None:
    """One of every kind of hooks on everything that may have some, but for single activations."""

    def counting(name: str) -> Any:
        def run(*given: Any) -> None:
            hits[name] += 1

        return run

    for name, m in model.named_modules():
        m.register_forward_pre_hook(counting(f"{name} forward pre"))
        m.register_forward_hook(counting(f"{name} forward"))
        if len(list(m.children())) == 0:
            m.register_full_backward_pre_hook(counting(f"{name} backward pre"))
            m.register_full_backward_hook(counting(f"{name} backward"))
    for name, p in model.named_parameters():
        p.register_hook(counting(f"{name} gradient"))
        p.register_post_accumulate_grad_hook(counting(f"{name} accumulated"))


def train(kind: str, rest: str, *, with_guest: bool) -> list[Any]:
    """Five steps, two of them without statistics, one in eval mode; all that the user could see."""
    model, hits, log = build(kind), Counter[str](), list[Any]()
    hook(model, hits)
    model[3].bias.requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt: Any = guest(model, base, rest=rest, every=5) if with_guest else base
    torch.manual_seed(7)
    for step in range(5):
        model.train(step != 1)
        opt.zero_grad()
        x, y = data(seed=step, dtype=torch.float32)
        if with_guest:
            with opt.watch():
                z = model(x)
            z.retain_grad()
            before = hits.copy()
            opt.observe(z)
            if kind == "plain":
                assert hits == before
        else:
            z = model(x)
            z.retain_grad()
        assert z.grad is None
        nn.functional.cross_entropy(z, y).backward()
        log += [z.detach().clone(), z.grad, *[p.grad for p in model.parameters() if p.requires_grad]]
        log += [b.clone() for b in model.buffers()]
        log += [torch.get_rng_state(), [m.training for m in model.modules()]]
        log += [
            [p.requires_grad for p in model.parameters()],
            [len(p._backward_hooks or ()) for p in model.parameters()],
        ]
        log.append({n: c for n, c in hits.items() if kind == "plain" or "forward" not in n})
        opt.step()
    return log


@pytest.mark.filterwarnings(OF_THE_DATA)
@pytest.mark.parametrize("rest", ["base", "diagonal"])
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "reentrant"])
def test_all_that_the_user_sees_is_as_without_a_guest(kind: str, rest: str) -> None:
    plain, served = train(kind, rest, with_guest=False), train(kind, rest, with_guest=True)
    assert len(plain) == len(served)
    for place, (a, b) in enumerate(zip(plain, served, strict=True)):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, place


@pytest.mark.filterwarnings(DEPRECATED)
def test_hooks_of_the_old_kind_keep_still_too() -> None:
    model, hits = build("plain"), Counter[str]()
    model[1].register_backward_hook(lambda m, i, o: hits.update(["old"]))
    opt = guest(model)
    with opt.watch():
        z = model(data(dtype=torch.float32)[0])
        opt.observe(z)
    assert not hits
    z.sum().backward()
    assert hits["old"] == 1


@pytest.mark.filterwarnings(OF_THE_DATA)
def test_two_guests_of_one_model_keep_each_others_passes_quiet() -> None:
    model, hits = build("plain"), Counter[str]()
    hook(model, hits)
    opts = [guest(model, torch.optim.SGD(model[i].parameters(), lr=0.1)) for i in (0, 4)]
    with opts[0].watch(), opts[1].watch():
        z = model(data(dtype=torch.float32)[0])
    before = hits.copy()
    for opt in opts:
        opt.observe(z)
    assert hits == before
    z.sum().backward()
    assert hits["0 backward"] == hits["4 backward"] == hits["4.weight gradient"] == 1


def test_hooks_that_change_gradients_do_not_change_curvature() -> None:
    found = []
    for scaled in (False, True):
        model = build("checkpointed")
        if scaled:
            model[1].register_full_backward_hook(lambda m, i, o: tuple(3.0 * g for g in i))
            model[0].weight.register_hook(lambda g: 2.0 * g)
        opt = guest(model, rest="diagonal")
        torch.manual_seed(1)
        with opt.watch():
            z = model(data(dtype=torch.float32)[0])
            opt.observe(z)
        found.append(opt.state_dict()["state"][0])
    assert sum("moments" in name for name in found[0]) > 3
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_model_without_its_guest_is_what_it_was() -> None:
    model = build("plain")
    hook(model, Counter())

    def shape() -> list[Any]:
        own = [
            (name, type(m), sorted(m.__dict__), *(len(getattr(m, kind)) for kind in ("_forward_hooks",
             "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_buffers", "_parameters")))
            for name, m in model.named_modules()
        ]  # fmt: skip
        return [own, [(id(p), id(p._backward_hooks)) for p in model.parameters()], vars(modules)["BackwardHook"]]

    before = shape()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    groups = {name: id(value) for name, value in base.param_groups[0].items() if name != "params"}
    opt = guest(model, base)
    with opt.watch():
        z = model(data(dtype=torch.float32)[0].requires_grad_())
        opt.observe(z)
    z.sum().backward()
    opt.step()
    assert shape() == before
    seen = weakref.ref(opt)
    del opt, z
    gc.collect()
    assert seen() is None
    assert {name: id(value) for name, value in base.param_groups[0].items() if name != "params"} == groups
    base.step()
    assert shape() == before
