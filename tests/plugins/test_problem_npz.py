"""The npz problem: a user's own arrays, right and wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfac_plugins.problems import NpzConfig
from kfac_plugins.problems.npz import Npz
from kfacore.errors import ConfigError, DataError, ResourceError
from kfacore.lab.data import check

RNG = np.random.default_rng(0)
X = RNG.random((12, 5))
X_TEST = RNG.random((4, 5))
LABELS = np.arange(12) % 3
LABELS_TEST = np.array([2, 1, 0, 0])


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KFAC_DATA", raising=False)


def problem(folder: Path, arrays: dict[str, np.ndarray], **options: object) -> Npz:
    np.savez(folder / "d.npz", **arrays)
    return Npz(NpzConfig.model_validate({"file": str(folder / "d.npz"), **options}))


def model_of(made: Npz) -> nn.Module:
    return made.build_model(torch.Generator().manual_seed(0))


def test_autoencoder_without_targets(tmp_path: Path) -> None:
    made = problem(tmp_path, {"x_train": X, "x_test": X_TEST}, sizes=[4, 2, 4], code_layer=2)
    data = made.load()
    assert made.task == "autoencoder"
    assert data.train.targets is data.train.inputs
    assert data.test is not None
    assert data.test.targets is data.test.inputs
    assert data.train.inputs.dtype == torch.float32
    check(data, Bernoulli(), 5)
    model = model_of(made)
    assert [type(module).__name__ for module in model.children()] == [
        "Linear", "Sigmoid", "Linear", "Linear", "Sigmoid", "Linear",
    ]  # fmt: skip
    assert model(data.train.inputs).shape == (12, 5)


def test_classifier(tmp_path: Path) -> None:
    arrays = {"x_train": X, "y_train": LABELS.astype(np.uint8)[:, None], "x_test": X_TEST, "y_test": LABELS_TEST}
    made = problem(tmp_path, arrays, sizes=[4], hidden="tanh")
    data = made.load()
    assert made.task == "classifier"
    assert data.train.targets.dtype == torch.int64
    assert data.train.targets.tolist() == LABELS.tolist()
    check(data, Categorical(), 3)
    assert model_of(made)(data.train.inputs).shape == (12, 3)
    more = problem(tmp_path, arrays, classes=7)
    assert model_of(more)(data.train.inputs).shape == (12, 7)


def test_regression(tmp_path: Path) -> None:
    made = problem(tmp_path, {"x_train": X, "y_train": X[:, 0]}, sizes=[], hidden="relu")
    data = made.load()
    assert made.task == "regression"
    assert data.test is None
    assert data.train.targets.shape == (12, 1)
    check(data, Gaussian(), 1)
    assert model_of(made)(data.train.inputs).shape == (12, 1)
    whole = problem(tmp_path, {"x_train": X, "y_train": LABELS}, task="regression").load()
    assert whole.train.targets.dtype == torch.float32


def test_images_keep_their_shape_for_pictures(tmp_path: Path) -> None:
    made = problem(tmp_path, {"x_train": X.reshape(3, 4, 5), "y_train": LABELS[:3]}, task="autoencoder")
    assert made.image_shape == (4, 5)
    assert made.load().train.inputs.shape == (3, 20)
    assert problem(tmp_path, {"x_train": X}).image_shape is None


def test_checksum_follows_the_arrays_and_not_the_file(tmp_path: Path) -> None:
    arrays = {"x_train": X, "y_train": LABELS}
    checksum = problem(tmp_path, arrays).load().checksum
    assert problem(tmp_path, {**arrays, "unused": X}).load().checksum == checksum
    assert problem(tmp_path, {**arrays, "y_train": LABELS[::-1]}).load().checksum != checksum


def test_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, env = tmp_path / "data", tmp_path / "env"
    for folder in (data, env):
        folder.mkdir()
        np.savez(folder / f"{folder.name}.npz", x_train=X)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"env\.npz: no such file in .*problem\.file"):
        Npz(NpzConfig(file="env.npz")).load()
    monkeypatch.setenv("KFAC_DATA", str(env))
    assert len(Npz(NpzConfig(file="env.npz")).load().train) == 12
    assert len(Npz(NpzConfig(file="data.npz", data_dir=str(data))).load().train) == 12
    assert len(Npz(NpzConfig(file="data/data.npz")).load().train) == 12
    assert NpzConfig(file="env.npz").data_status().state == "unverified"
    assert NpzConfig(file="nothing.npz").data_status().state == "missing"
    assert NpzConfig().data_status().state == "missing"


def test_no_file_named() -> None:
    with pytest.raises(ConfigError, match=r"--set problem\.file="):
        Npz().load()


def spoiled(value: float) -> np.ndarray:
    array = X.copy()
    array[7, 2] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no array 'x_train'"),
        ({"X_train": X}, "did you mean 'X_train'"),
        ({"x_train": X[:0]}, r"'x_train' is empty, shape \(0, 5\)"),
        ({"x_train": X[:, :0]}, r"'x_train' is empty, shape \(12, 0\)"),
        ({"x_train": np.array(1.0)}, r"'x_train' is empty|at least one example"),
        ({"x_train": spoiled(np.nan)}, "'x_train': 1 of 12 examples hold NaN.*example 7"),
        ({"x_train": spoiled(-np.inf)}, "hold NaN, infinity"),
        ({"x_train": spoiled(1e300)}, "beyond float32"),
        ({"x_train": X + 1j}, "dtype complex128"),
        ({"x_train": np.full((3, 2), "a")}, "dtype <U1; needed are real numbers$"),
        ({"x_train": X, "y_train": np.full(12, "cat")}, r"'y_train' has dtype <U3; .*number words with numpy.unique"),
        ({"x_train": np.array([[1, None]], dtype=object)}, "Python objects"),
        ({"x_train": X, "y_train": LABELS[:11]}, "x_train has 12 examples, y_train has 11"),
        ({"x_train": X, "y_train": LABELS - 1}, "'y_train': class numbers must be 0 or more, found -1 at example 0"),
        ({"x_train": X, "y_train": np.eye(12, dtype=int)}, r"'y_train' has shape \(12, 12\).*argmax"),
        ({"x_train": X, "y_train": spoiled(np.nan)}, "'y_train': 1 of 12 examples"),
        ({"x_train": X, "y_train": LABELS, "x_test": X_TEST}, "no y_test"),
        ({"x_train": X, "y_train": LABELS, "y_test": LABELS_TEST}, "y_test but no x_test"),
        ({"x_train": X, "x_test": X_TEST, "y_test": LABELS_TEST}, "y_test but no y_train"),
        ({"x_train": X, "x_test": X_TEST[:, :4]}, r"x_test have shape \(4,\), those of x_train \(5,\)"),
        ({"x_train": X, "x_test": X_TEST[:0]}, "'x_test' is empty"),
        (
            {"x_train": X, "y_train": LABELS, "x_test": X_TEST, "y_test": LABELS_TEST + 1},
            "'y_test': class numbers must be 0 to 2, found 3 at example 0 and 1 such examples.*problem.classes",
        ),
        (
            {"x_train": X, "y_train": LABELS, "x_test": X_TEST, "y_test": LABELS_TEST / 2},
            "'y_test' has dtype float64; a classifier needs integer",
        ),
        (
            {"x_train": X, "y_train": X, "x_test": X_TEST, "y_test": X_TEST[:, :2]},
            "y_test has 2 columns, y_train has 5",
        ),
    ],
)
def test_wrong_arrays_are_refused_by_name(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.npz: .*({message})"):
        problem(tmp_path, arrays).load()


IDS = 1000 * (np.arange(12) % 10) + 17


@pytest.mark.parametrize("labels", [IDS, IDS * 10_000, IDS.astype(np.int64) * 10**14, np.full(12, 2**63, np.uint64)])
def test_ids_are_no_class_numbers(tmp_path: Path, labels: np.ndarray) -> None:
    """They would make a model of as many outputs, and take all memory before anybody is told."""
    made = problem(tmp_path, {"x_train": X, "y_train": labels})
    with pytest.raises(DataError, match=r"'y_train'.*(distinct class numbers|must be 0 or more)"):
        model_of(made)


def test_the_advice_about_ids_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 distinct class numbers, the largest 9017.*return_inverse.*classes=9018"):
        problem(tmp_path, {"x_train": X, "y_train": IDS}).load()
    renumbered = np.unique(IDS, return_inverse=True)[1]
    assert model_of(problem(tmp_path, {"x_train": X, "y_train": renumbered}))[-1].out_features == 10
    assert model_of(problem(tmp_path, {"x_train": X, "y_train": IDS}, classes=9018))[-1].out_features == 9018
    quantities = problem(tmp_path, {"x_train": X, "y_train": IDS}, task="regression")
    check(quantities.load(), Gaussian(), 1)


def test_a_few_empty_classes_are_no_ids(tmp_path: Path) -> None:
    labels = np.array([0, 2, 3, 19] * 3)
    assert model_of(problem(tmp_path, {"x_train": X, "y_train": labels}))[-1].out_features == 20


def test_a_net_larger_than_the_machine_is_not_tried(tmp_path: Path) -> None:
    huge = problem(tmp_path, {"x_train": X, "y_train": LABELS}, classes=10**12)
    with pytest.raises(ResourceError, match=r"GB of parameters, this machine"):
        model_of(huge)


def test_a_file_of_the_working_folder_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "d.npz", x_train=X)
    monkeypatch.chdir(tmp_path)
    assert NpzConfig(file="d.npz").located().file == str(tmp_path / "d.npz")
    assert NpzConfig(file="e.npz", data_dir="d").located() == NpzConfig(file="e.npz", data_dir=str(tmp_path / "d"))
    assert NpzConfig().located() == NpzConfig()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'y_train', which a classifier needs"):
        problem(tmp_path, {"x_train": X}, task="classifier").load()
    with pytest.raises(DataError, match="'y_train' has dtype float64"):
        problem(tmp_path, {"x_train": X, "y_train": X}, task="classifier").load()
    with pytest.raises(DataError, match="must be 0 to 1, found 2 at example 2"):
        problem(tmp_path, {"x_train": X, "y_train": LABELS}, classes=2).load()
    with pytest.raises(ConfigError, match=r"problem\.classes=3 is for a classifier"):
        problem(tmp_path, {"x_train": X}, classes=3).load()
    with pytest.raises(ConfigError, match="numbered 1 to 3"):
        model_of(problem(tmp_path, {"x_train": X}, code_layer=4))


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_text("1,2,3")
    with pytest.raises(DataError, match=r"not a \.npz file"):
        Npz(NpzConfig(file=str(tmp_path / "d.npz"))).load()
