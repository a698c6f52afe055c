"""States of `KFAC`: tensors at parameters, for whatever reads states of optimizers, and refusals by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from late import Late
from safetensors.torch import load_file, save_file
from test_contract import data, make, net
from torch import nn

from kfacore import KFAC, ConfigError, Preconditioned
from kfacore.optim.guest_state import own_state, split_state

dcp = Late("torch.distributed.checkpoint")
state_dicts = Late("torch.distributed.checkpoint.state_dict")

KINDS: list[dict[str, Any]] = [
    {},
    {"approx": "tridiag", "trust": "undo"},
    {"approx": {"kind": "blockdiag", "refresh": "background", "refresh_every": 4, "refresh_delay": 2}},
]


def run(optimizer: KFAC, start: int, stop: int) -> list[float]:
    return [float(optimizer.step(*data(k)).objective) for k in range(start, stop)]


def twin_of(optimizer: KFAC, **options: Any) -> KFAC:
    model = net()
    model.load_state_dict(optimizer.model.state_dict())
    return make(model, **options)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process, which is what is meant
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("way", ["torch.save", "safetensors", "dcp memory", "dcp files"])
def test_a_run_goes_on_bit_for_bit(options: dict[str, Any], way: str, tmp_path: Path) -> None:
    optimizer = make(**options)
    run(optimizer, 0, 7)
    other = twin_of(optimizer, **options)
    if way == "torch.save":
        torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
        other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    elif way == "safetensors":
        state = optimizer.state_dict()
        flat = {f"{key}/{name}": value for key, entry in state["state"].items() for name, value in entry.items()}
        save_file(flat, tmp_path / "opt.safetensors")
        entries: dict[int, dict[str, Any]] = {}
        for name, value in load_file(tmp_path / "opt.safetensors").items():
            key, _, rest = name.partition("/")
            entries.setdefault(int(key), {})[rest] = value
        other.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    elif way == "dcp memory":
        buffer = io.BytesIO()
        torch.save(state_dicts.get_optimizer_state_dict(optimizer.model, optimizer), buffer)
        buffer.seek(0)
        state_dicts.set_optimizer_state_dict(other.model, other, torch.load(buffer, weights_only=True))
    else:
        saved = {"opt": state_dicts.get_optimizer_state_dict(optimizer.model, optimizer)}
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
        run(other, 0, 1)  # DCP reads what the target has names for: one step gives it these
        other.model.load_state_dict(optimizer.model.state_dict())
        found = {"opt": {key: empty(value) for key, value in saved["opt"].items()}}
        dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "dcp"), no_dist=True)
        state_dicts.set_optimizer_state_dict(other.model, other, found["opt"])
    assert other.steps == 7
    assert run(other, 7, 16) == run(optimizer, 7, 16)


def empty(value: Any) -> Any:
    """The same names with other tensors."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: empty(each) for key, each in value.items()}
    return value


def test_curvature_lies_at_parameters_as_tensors_alone() -> None:
    optimizer = make()
    run(optimizer, 0, 3)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for index in (0, 2):  # the first parameter of each Linear
        assert any(name.startswith("kfac.") and "moments" in name for name in state["state"][index])
    storages = [value.untyped_storage().data_ptr() for entry in state["state"].values() for value in entry.values()]
    assert len(set(storages)) == len(storages)
    for entry in state["state"].values():
        for value in entry.values():
            assert isinstance(value, torch.Tensor)
            assert value.is_contiguous()


def test_a_fresh_optimizer_can_be_looked_into() -> None:
    """Tools make a step with rates of zero where there is no state: there is one from the beginning."""
    optimizer = make()
    assert state_dicts.get_optimizer_state_dict(optimizer.model, optimizer)["state"]
    assert optimizer.steps == 0


def test_a_state_of_the_last_version_loads() -> None:
    optimizer = make()
    run(optimizer, 0, 4)
    state, _ = split_state(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["lr"]
    old = {**state, "state": {}, "kfac": own_state(optimizer.state_dict())}
    other = twin_of(optimizer)
    other.load_state_dict(old)
    assert run(other, 4, 8) == run(optimizer, 4, 8)


def test_states_of_the_two_doors_are_refused_by_name() -> None:
    optimizer = make()
    run(optimizer, 0, 2)
    model = net()
    guest = Preconditioned(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood="categorical")
    with pytest.raises(ConfigError, match="the state is of KFAC"):
        guest.load_state_dict(optimizer.state_dict())
    x, y = data()
    with guest.watch():
        z = model(x)
        guest.observe(z)
        loss = nn.functional.cross_entropy(z, y)
    loss.backward()
    guest.step()
    with pytest.raises(ConfigError, match="not of a KFAC optimizer, but of Preconditioned"):
        optimizer.load_state_dict(guest.state_dict())
