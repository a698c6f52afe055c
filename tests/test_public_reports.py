"""Situations from public reports of other libraries: the answer is right, or a refusal that says what to do.

Each test has the report in its docstring, and further members of its kind beside it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from kfacore import KFAC
from kfacore.errors import DataError


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def losses(model: nn.Module, inputs: Any, targets: Tensor, steps: int = 3, **options: Any) -> list[float]:
    optimizer = KFAC(model, likelihood="categorical", **options)
    return [float(optimizer.step(inputs, targets).loss) for _ in range(steps)]


def _weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    nn.utils.remove_weight_norm(layer)


def _parametrised(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")


def _spectral(layer: nn.Linear) -> None:
    weight = layer.weight.detach().clone()
    parametrizations.orthogonal(layer)
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight.data.copy_(weight)


def _pruned(layer: nn.Linear) -> None:
    prune.identity(layer, "weight")
    prune.remove(layer, "weight")


def _renewed(layer: nn.Linear) -> None:
    weight, layer.weight = layer.weight, None  # type: ignore[assignment]
    del layer.weight
    layer.register_parameter("weight", weight)


@pytest.mark.parametrize("strip", [_weight_norm, _parametrised, _spectral, _pruned, _renewed])
def test_the_bias_may_come_before_the_weight(strip: Callable[[nn.Linear], None]) -> None:
    """Weight norm taken off again before fine-tuning (pytorch/pytorch 91304)."""
    model = net().double()
    for layer in (model[0], model[2]):
        strip(layer)
    assert losses(model, X.double(), Y) == pytest.approx(losses(net().double(), X.double(), Y), abs=1e-6)


class Weighted(nn.Module):
    """Multiplies each example by its own number, which comes as a list, or in a buffer by position."""

    def __init__(self, kept: bool = False) -> None:
        super().__init__()
        self.body = net()
        if kept:
            self.register_buffer("weights", 1.0 + 0.5 * (torch.arange(64) % 7))

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, Tensor):
            return self.body(batch * self.weights[: len(batch), None])
        rows, weights = batch.values() if isinstance(batch, dict) else batch
        return self.body(torch.stack([row * weight for row, weight in zip(rows, weights, strict=False)]))


@pytest.mark.parametrize("form", ["list", "tuple", "table", "buffer"])
def test_what_belongs_to_examples_and_is_no_tensor(form: str) -> None:
    """Weights of examples as a plain list beside the tensor (pytorch/pytorch 3779)."""
    model = Weighted(form == "buffer").double()
    weights = [1.0 + 0.5 * (index % 7) for index in range(64)]
    x = X.double()
    batch = {"list": (x, weights), "tuple": (x, tuple(weights)), "table": {"x": x, "w": weights}, "buffer": x}[form]
    want = float(nn.functional.cross_entropy(model(batch), Y).detach())
    assert losses(model, batch, Y, 1) == pytest.approx([want], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_byte_level_classes(dtype: torch.dtype) -> None:
    """uint8 labels and 256 outputs, which torch compares wrongly (pytorch/pytorch 101653)."""
    labels = torch.arange(64) * 4
    assert losses(net(256), X, labels.to(dtype)) == losses(net(256), X, labels)


@pytest.mark.parametrize("label", [-100, -1, 3, 255])
def test_labels_out_of_range_first_in_a_later_mini_batch(label: int) -> None:
    """Padding labels that the first mini-batch does not have (azavea/raster-vision 969)."""
    optimizer = KFAC(net(), likelihood="categorical")
    optimizer.step(X, Y)
    wrong = Y.clone()
    wrong[5] = label
    with pytest.raises(DataError, match=f"found {label} at example 5"):
        optimizer.step(X, wrong)


def test_an_optimizer_that_is_built_before_a_lazy_module_has_seen_data() -> None:
    """LazyLinear (pytorch/pytorch 150404)."""
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    fresh = losses(lazy, X, Y)
    torch.manual_seed(0)
    again = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    again(X)
    assert fresh[0] == pytest.approx(losses(again, X, Y)[0], rel=0.5)
    assert fresh[-1] < fresh[0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"])
def test_an_optimizer_is_copied_whole(way: Callable[[Any], Any]) -> None:
    """deepcopy and pickle (kakaobrain/torchlars 5)."""
    optimizer = KFAC(net(), likelihood="categorical")
    optimizer.step(X, Y)
    other = way(optimizer)
    assert float(other.step(X, Y).loss) == float(optimizer.step(X, Y).loss)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_a_state_goes_on_in_another_precision(first: torch.dtype) -> None:
    """A float32 state in a float64 model, and back (pytorch/pytorch 43706)."""
    second = torch.float64 if first == torch.float32 else torch.float32
    model, other = net().to(first), net().to(second)
    optimizer = KFAC(model, likelihood="categorical")
    for _ in range(3):
        optimizer.step(X.to(first), Y)
    other.load_state_dict(model.state_dict())
    again = KFAC(other, likelihood="categorical")
    again.load_state_dict(optimizer.state_dict())
    assert float(again.step(X.to(second), Y).loss) == pytest.approx(
        float(optimizer.step(X.to(first), Y).loss), rel=1e-4
    )


def test_the_advice_about_a_column_of_labels_is_right() -> None:
    """Labels of shape (n, 1) (Trusted-AI/adversarial-robustness-toolbox 2808)."""
    with pytest.raises(DataError, match=r"\.squeeze\(1\)$"):
        losses(net(), X, Y[:, None])
    assert losses(net(), X, Y[:, None].squeeze(1)) == losses(net(), X, Y)


@pytest.mark.parametrize("trust", [None, "none"])
@pytest.mark.parametrize(
    ("place", "value"), [("inputs", float("nan")), ("inputs", float("inf")), ("targets", float("nan"))]
)
@pytest.mark.parametrize("spoiled", [1, 2, 9])
def test_one_number_that_is_not_finite(spoiled: int, place: str, value: float, trust: str | None) -> None:
    """One NaN in one mini-batch (google-deepmind/ferminet 57): seen in its own step, and the parameters stay whole."""
    model = net()
    optimizer = KFAC(model, likelihood="gaussian", **({} if trust is None else {"trust": trust}))
    x, y = X.clone(), X[:, :3].clone()
    for _ in range(spoiled - 1):
        optimizer.step(X, X[:, :3])
    (x if place == "inputs" else y)[3, 2] = value
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(DataError, match="NaN"):
        optimizer.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert bool(torch.isfinite(optimizer.step(X, X[:, :3]).loss))


# --- through the command ---------------------------------------------------------------------------------------------


def write(folder: Path, targets: np.ndarray, name: str = "data.npz") -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(60, 5)).astype("float32")
    np.savez(folder / name, x_train=x, y_train=targets)
    return x


SMALL = ("--set", "problem.sizes=[4]", "--set", "batch.start=20", "--set", "sink=[]", "--threads", "1")


@pytest.mark.parametrize(("factor", "offset"), [(1000, 17), (10_000_000, 0), (1, 5000)])
def test_ids_are_no_class_numbers(kfac, tmp_path: Path, factor: int, offset: int) -> None:
    """Ten ids from a database (keras-team/keras 7339): thousands of outputs are not built, and up to 90 million not."""
    write(tmp_path, (np.arange(60) % 10) * factor + offset)
    code, _, err = kfac("train", "data.npz", *SMALL, "--set", "likelihood=categorical", "--dry-run")
    assert code == 2
    assert "holds 10 distinct class numbers, the largest" in err


def test_a_run_goes_on_from_another_folder(kfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative data file (facebookresearch/hydra 922)."""
    write(tmp_path, np.arange(60) % 3)
    assert kfac("train", "data.npz", *SMALL, "--steps", "1", "--out", "run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = kfac("train", "--resume", tmp_path / "run", "--steps", "2")
    assert code == 0, err


DATA = {
    "labels": np.arange(60) % 3,
    "prices": 1000 * np.arange(60) + 500,
    "reals": np.linspace(-1.0, 1.0, 60),
    "bits": np.arange(60)[:, None] % 2 * np.ones(3),
    "ids": (np.arange(60) % 10) * 1000 + 17,
}


@pytest.mark.parametrize("likelihood", [None, "gaussian", "categorical", "bernoulli"])
@pytest.mark.parametrize("kind", DATA)
def test_a_dry_run_accepts_what_the_run_accepts(kfac, tmp_path: Path, kind: str, likelihood: str | None) -> None:
    """And refuses what it refuses, in the same words."""
    write(tmp_path, DATA[kind])
    line = ["train", "data.npz", *SMALL, "--steps", "1", *(["--set", f"likelihood={likelihood}"] if likelihood else [])]
    dry = kfac(*line, "--dry-run")
    real = kfac(*line, "--out", "run")
    assert dry[0] == real[0], (dry[2], real[2])
    if dry[0]:
        assert dry[2].splitlines()[-1] == real[2].splitlines()[-1]
