from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kfacore.errors import DataError
from kfacore.lab.training.init import load_parameters


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, 3))


@pytest.fixture
def values(model):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def _save(values, path):
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in values.items()})
    else:
        save_file(values, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_parameters_are_taken_up(tmp_path, model, values, suffix):
    path = _save(values, tmp_path / f"p{suffix}")
    facts = load_parameters(model, path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad
    assert facts == {"file": f"p{suffix}", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.bias": None}, "parameter '2.bias' of the model is missing"),
        ({"0.wieght": torch.ones(2, 3), "0.weight": None}, "'0.wieght' is no parameter.*did you mean '0.weight'"),
        ({"0.weight": torch.ones(3, 2)}, r"'0.weight' has shape \(3, 2\), the model needs \(2, 3\)"),
        ({"0.bias": torch.tensor([1.0, float("nan")])}, "'0.bias' holds NaN or infinity"),
        ({"0.bias": torch.tensor([1, 2])}, "'0.bias' has dtype torch.int64"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, model, values, suffix, change, message):
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = {name: value for name, value in {**values, **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        load_parameters(model, _save(given, tmp_path / f"p{suffix}"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npz", None, "no such file"),
        ("p.bin", b"x", "found a '.bin' file"),
        ("p.pt", b"x", "cannot be read as a checkpoint.*give a checkpoint of kfac train"),
        ("p.npz", b"x", "not a .npz file.*one array of numbers for each parameter"),
        ("p.safetensors", b"x", "not a readable .safetensors.*save_file"),
        ("p.npz", b"PK\x03\x04 cut", "not a .npz file.*one array of numbers for each parameter"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, model, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_parameters(model, tmp_path / name)
    assert str(caught.value).startswith(f"--init {tmp_path / name}: ") or name in ("p.safetensors", "p.pt")
    assert "pickle" not in str(caught.value)  # numpy's own advice, which would be to run what is in the file


def test_pickles_are_not_loaded(tmp_path, model):
    np.savez(tmp_path / "p.npz", **{"0.weight": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(DataError, match=r"array '0\.weight' holds Python objects.*one array of numbers"):
        load_parameters(model, tmp_path / "p.npz")


def test_text_is_no_parameter(tmp_path, model):
    np.savez(tmp_path / "p.npz", **{"0.weight": np.array(["a"])})
    with pytest.raises(DataError, match="one array of numbers for each parameter"):
        load_parameters(model, tmp_path / "p.npz")


def test_a_single_array_is_no_npz(tmp_path, model):
    with open(tmp_path / "p.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r"single \.npy array"):
        load_parameters(model, tmp_path / "p.npz")
