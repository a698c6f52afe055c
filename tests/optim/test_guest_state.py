"""A guest's checkpoints and copies: tensors at parameters, bit for bit, and states of others refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest, mlp, run
from late import Late
from torch import nn

from kfacore import KFAC, ConfigError, Preconditioned, UnsupportedModelError

dcp = Late("torch.distributed.checkpoint")
state_dicts = Late("torch.distributed.checkpoint.state_dict")

KINDS: list[dict[str, Any]] = [
    {},
    {"scale": "kl"},
    {"rest": "diagonal", "approx": "tridiag"},
    {"approx": {"kind": "blockdiag", "refresh": "background", "refresh_delay": 2}, "every": 4},
    {"approx": "diagonal", "scale": "none"},
    {"likelihood": None},
]
BASES = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.01), "sgd": lambda p: torch.optim.SGD(p, lr=0.01)}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def on(opt: Preconditioned, model: nn.Module, start: int, stop: int) -> list[torch.Tensor]:
    for step in range(start, stop):
        x, y = data(seed=step, dtype=next(model.parameters()).dtype)
        opt.zero_grad()
        backward(opt, model, x, y)
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_run_goes_on_bit_for_bit(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model, base = net(), BASES[kind]
    opt = guest(model, base(model.parameters()), **options)
    on(opt, model, 0, 9)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    wanted = on(opt, model, 9, 25)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    twin = net()
    twin.load_state_dict(saved["model"])
    other = guest(twin, base(twin.parameters()), **options)
    other.load_state_dict(saved["opt"])
    assert all(torch.equal(a, b) for a, b in zip(wanted, on(other, twin, 9, 25), strict=True))


def test_curvature_lies_at_parameters_as_tensors_alone() -> None:
    model = net()
    opt = guest(model, torch.optim.AdamW(model.parameters()))
    on(opt, model, 0, 3)
    state = opt.state_dict()["state"]
    for index in (0, 4):  # the first parameter of each Linear
        assert any(name.startswith("kfac.") and "moments" in name for name in state[index])
    for entry in state.values():
        for value in entry.values():
            assert isinstance(value, torch.Tensor)
            assert value.is_contiguous()
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_groups_and_state_are_the_bases_also_after_loading() -> None:
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    opt = guest(model, base)
    on(opt, model, 0, 2)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    opt.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, on(opt, model, 2, 4), strict=True))


@pytest.mark.parametrize("kind", BASES)
def test_the_distributed_checkpoint_round_trip(kind: str) -> None:
    model = net()
    opt = guest(model, BASES[kind](model.parameters()))
    on(opt, model, 0, 5)
    state = state_dicts.get_optimizer_state_dict(model, opt)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    twin = net()
    twin.load_state_dict(model.state_dict())
    other = guest(twin, BASES[kind](twin.parameters()))
    state_dicts.set_optimizer_state_dict(twin, other, torch.load(buffer, weights_only=True))
    assert other.steps == opt.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(on(opt, model, 5, 9), on(other, twin, 5, 9), strict=True))


def test_copies_and_pickles_step() -> None:
    model = net()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    on(opt, model, 0, 4)
    twin, other = copy.deepcopy((model, opt))
    third, last = pickle.loads(pickle.dumps((model, opt)))
    assert other.network.model is twin
    wanted = on(opt, model, 4, 9)
    for again in (on(other, twin, 4, 9), on(last, third, 4, 9)):
        assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_a_state_in_another_precision_goes_on() -> None:
    model = net()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01), estimator=EXACT)
    on(opt, model, 0, 4)
    twin = net(torch.float64)
    twin.load_state_dict(model.state_dict())
    other = guest(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), estimator=EXACT)
    other.load_state_dict(opt.state_dict())
    for a, b in zip(on(opt, model, 4, 7), on(other, twin, 4, 7), strict=True):
        assert torch.allclose(a.double(), b, atol=1e-3)


def test_states_of_others_are_refused_by_name() -> None:
    model = net()
    opt = guest(model, torch.optim.AdamW(model.parameters()))
    on(opt, model, 0, 2)
    state = opt.state_dict()
    other = guest(net(), None, approx="tridiag")
    with pytest.raises(ConfigError, match="approx = 'blockdiag', this optimizer has 'tridiag'"):
        other.load_state_dict(state)
    wide = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4))
    with pytest.raises(UnsupportedModelError, match=r"3: its weight block has shape \(4, 7\)"):
        guest(wide).load_state_dict(state)
    deep = nn.Sequential(*net(), nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="has the blocks 0, 3; this model has 0, 3, 4"):
        guest(deep).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_distributed_checkpoint_is_read_in_place(first: int, tmp_path: Path) -> None:
    """From the disk, into an optimizer that is elsewhere in its run; one that has no curvature yet is told."""
    model = mlp()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01), every=3)
    run(opt, model, 11)
    kept = {"model": model.state_dict(), "optimizer": state_dicts.get_optimizer_state_dict(model, opt)}
    dcp.save(kept, checkpoint_id=tmp_path / "kept", no_dist=True)
    other = mlp(seed=1)
    mine = guest(other, torch.optim.AdamW(other.parameters(), lr=0.01), every=3)
    run(mine, other, first)
    target = {"model": other.state_dict(), "optimizer": state_dicts.get_optimizer_state_dict(other, mine)}
    dcp.load(target, checkpoint_id=tmp_path / "kept", no_dist=True)
    if first == 0:
        with pytest.raises(ConfigError, match=r"the state lacks kfac\..*take one step before"):
            state_dicts.set_optimizer_state_dict(other, mine, target["optimizer"])
        return
    other.load_state_dict(target["model"])
    state_dicts.set_optimizer_state_dict(other, mine, target["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(run(opt, model, 4), run(mine, other, 4), strict=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, "it has epoch, not state and param_groups"),
        ({}, "it has nothing, not state"),
        ([1], "it is a list, not a dict"),
        ({"state": 1, "param_groups": []}, "its state must be a dict"),
    ],
)
def test_a_state_of_no_optimizer(state: Any, message: str) -> None:
    for opt in (guest(mlp()), KFAC(mlp(), likelihood="categorical")):
        with pytest.raises(ConfigError, match=f"the state is not of an optimizer: {message}"):
            opt.load_state_dict(state)


def test_the_bases_own_state_begins_without_curvature() -> None:
    model = net()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    nn.functional.cross_entropy(model(data(dtype=torch.float32)[0]), data()[1]).backward()
    base.step()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    with pytest.warns(UserWarning, match="no curvature: statistics begin anew"):
        opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["lr"] == 0.01
    on(opt, model, 0, 2)


def test_an_mlp_in_double_precision_is_served_as_well() -> None:
    model = mlp()
    assert all(torch.isfinite(p).all() for p in run(guest(model, torch.optim.Adam(model.parameters())), model, 3))
