"""From a configuration to the parts of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small_config, write_data
from torch import nn

from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.errors import ConfigError, DataError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.setup import build_model, build_parts, check_data, manifest, method_of, place, resolve_device
from kfacore.registry import get_registry
from kfacore.roles import ProblemData, Split


def parts_of(folder: Path, *more: str):
    return build_parts(small_config(folder, *more), get_registry())


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:77", "meta", "nonsense"])
def test_devices_that_cannot_compute(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used: .*; try auto or cpu"):
        resolve_device(name)


def test_method_is_what_tells_runs_apart() -> None:
    assert method_of(resolve(get_registry(), sets=["approx=blockdiag"])) == "blockdiag"
    assert method_of(resolve(get_registry(), sets=["optimizer=adam"])) == "adam"


def test_initial_parameters_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def parameters(*sets: str) -> list[torch.Tensor]:
        return [p.detach().double() for p in parts_of(tmp_path, *sets).model.parameters()]

    first = parameters("seed=1")
    torch.rand(7)  # the global generator has no part in it
    for same in (parameters("seed=1"), parameters("seed=1", "optimizer=adam"), parameters("seed=1", "dtype=float64")):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], parameters("seed=2")[0])


def test_parts_fit_together(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, "dtype=float64")
    assert (len(parts.train), len(parts.test)) == (60, 20)
    assert {p.dtype for p in parts.model.parameters()} == {parts.train.inputs.dtype} == {torch.float64}
    assert parts.data.train.inputs.dtype == torch.float32  # as loaded, which is what the checksum is of
    assert parts.train.targets is parts.train.inputs  # an autoencoder's targets are not stored twice
    assert parts.optimizer.model is parts.model
    assert parts.average.model is None
    assert (parts.device_name, parts.init) == ("cpu", None)
    model = build_model(small_config(tmp_path), parts.problem)
    assert all(torch.equal(a.double(), b) for a, b in zip(model.parameters(), parts.model.parameters(), strict=True))


def test_the_average_can_be_switched_off(tmp_path: Path) -> None:
    assert parts_of(tmp_path, "averaging.decay=0.0").average is None


def test_a_test_set_is_not_needed(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((10, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x_train=x)
    assert parts_of(tmp_path).test is None


def test_labels_stay_integers() -> None:
    x, y = torch.rand(3, 2), torch.tensor([0, 1, 2])
    placed = place(Split(x, y), torch.device("cpu"), torch.float64)
    assert (placed.inputs.dtype, placed.targets.dtype) == (torch.float64, torch.int64)


class Odd(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2), r"the model does not take inputs of shape \(4,\)"),
        (Odd(torch.ones(2, 3)), r"must return natural parameters .* found shape \(2, 3\) for one example"),
        (Odd((torch.ones(1, 2),)), "must return natural parameters .* found tuple"),
    ],
)
def test_models_that_do_not_fit_the_data(model: nn.Module, message: str) -> None:
    x = torch.rand(5, 4)
    with pytest.raises(DataError, match=message):
        check_data(model, Gaussian(), ProblemData(Split(x, x), None, "", "the test"))


class Positions(nn.Module):
    """Three classes at each of two positions, and a batch norm that one case cannot have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.layer(self.norm(x))
        return z.view(-1, 2, 3)


def test_targets_of_positions_are_checked_and_the_model_stays_as_it_was() -> None:
    x, model = torch.rand(5, 4), Positions()
    model.layer.eval()
    good = torch.zeros(5, 2, dtype=torch.int64)
    check_data(model, Categorical(), ProblemData(Split(x, good), None, "", "the test"))
    assert (model.training, model.norm.training, model.layer.training) == (True, True, False)
    assert int(model.norm.num_batches_tracked) == 0
    bad = good.clone()
    bad[3, 1] = 3
    with pytest.raises(DataError, match=r"training targets \(the test, as rows, 2 positions an example\): .*example 7"):
        check_data(model, Categorical(), ProblemData(Split(x, bad), None, "", "the test"))
    with pytest.raises(DataError, match=r"outputs of shape \(1, 2, 3\) need class numbers of shape \(1, 2\)"):
        check_data(model, Categorical(), ProblemData(Split(x, good[:, :1]), None, "", "the test"))


def test_the_manifest_has_what_the_numbers_depend_on(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = small_config(tmp_path, "seed=5")
    parts = build_parts(config, get_registry())
    record = manifest(config, get_registry(), parts, "2020-01-01T00:00:00+00:00")
    assert json.loads(json.dumps(record)) == record
    assert (record["started"], record["seed"], record["dtype"]) == ("2020-01-01T00:00:00+00:00", 5, "float32")
    assert record["versions"]["numpy"] == np.__version__
    assert [plugin["name"] for plugin in record["plugins"]] == ["builtin"]
    assert record["data"]["checksum"] == parts.data.checksum
    assert (record["parameters"], record["init"], record["resumed"]) == (339, None, [])
    assert record["data"]["source"] == str(tmp_path / "data.npz")
