"""`kfac train` and the data people bring: what the dry run says, and going on from another folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("no_pictures")

Kfac = Callable[..., tuple[int, str, str]]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5)).astype("float32")
CLASSES = X[:, :3].argmax(1)
BASE = ("train", "--problem", "npz", "--set", "problem.file=data.npz", "--set", "problem.sizes=[4]", "--steps", "1")


def spoiled(y: np.ndarray, value: float) -> np.ndarray:
    y = y.copy()
    y[7] = value
    return y


CASES: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...], int]] = {
    "class numbers, gaussian": ({"y_train": CLASSES}, ("likelihood=gaussian",), 2),
    "class numbers": ({"y_train": CLASSES}, (), 0),
    "class numbers, categorical": ({"y_train": CLASSES}, ("likelihood=categorical",), 0),
    "class numbers, bernoulli": ({"y_train": CLASSES}, ("likelihood=bernoulli",), 2),
    "prices": ({"y_train": 1000 * np.arange(60)}, (), 2),
    "prices as quantities": ({"y_train": 1000 * np.arange(60)}, ("problem.task=regression",), 0),
    "small prices": ({"y_train": np.arange(60)}, (), 2),
    "numbers, categorical": ({"y_train": X[:, 0]}, ("likelihood=categorical",), 2),
    "numbers, gaussian": ({"y_train": X[:, 0]}, (), 0),
    "beyond [0, 1]": ({"y_train": X}, ("likelihood=bernoulli",), 2),
    "not a number": ({"y_train": spoiled(X[:, 0], np.nan)}, (), 2),
    "a test label too many": (
        {"y_train": CLASSES, "x_test": X, "y_test": spoiled(CLASSES, 3)},
        ("likelihood=categorical",),
        2,
    ),
    "an unknown device": ({"y_train": X[:, 0]}, ("device=cuda:77",), 2),
    "weights of another number": ({"y_train": CLASSES}, ("likelihood=categorical", "likelihood.weight=[1.0, 2.0]"), 2),
    "options of the likelihood": (
        {"y_train": CLASSES},
        ("likelihood=categorical", "likelihood.weight=[1.0, 2.0, 0.5]", "likelihood.label_smoothing=0.1"),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dry_run_refuses_what_the_run_refuses(kfac: Kfac, tmp_path: Path, case: str) -> None:
    arrays, sets, wanted = CASES[case]
    np.savez(tmp_path / "data.npz", x_train=X, **arrays)
    options = [part for assignment in sets for part in ("--set", assignment)]
    dry, _, dry_message = kfac(*BASE, *options, "--dry-run")
    code, _, message = kfac(*BASE, *options, "--out", "run")
    assert (dry, code) == (wanted, wanted), (dry_message, message)
    if wanted:
        assert dry_message == message


def test_prices_are_not_told_to_be_classes(kfac: Kfac, tmp_path: Path) -> None:
    for prices in (1000 * np.arange(60), np.arange(60)):
        np.savez(tmp_path / "data.npz", x_train=X, y_train=prices)
        _, _, message = kfac(*BASE)
        assert "problem.task=regression" in message
        assert "categorical" not in message


def test_the_dry_run_looks_at_the_run_folder(kfac: Kfac, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x_train=X, y_train=X[:, 0])
    assert kfac(*BASE, "--out", "run")[0] == 0
    assert kfac(*BASE, "--out", "run", "--dry-run")[0] == 2


@pytest.mark.parametrize("likelihood", ["mse", "cross_entropy", "bce"])
def test_names_from_elsewhere_have_a_hint(kfac: Kfac, tmp_path: Path, likelihood: str) -> None:
    np.savez(tmp_path / "data.npz", x_train=X, y_train=X[:, 0])
    meant = {"mse": "gaussian", "cross_entropy": "categorical", "bce": "bernoulli"}[likelihood]
    code, _, message = kfac(*BASE, "--set", f"likelihood={likelihood}")
    assert code == 2
    assert f"did you mean '{meant}'?" in message


@pytest.fixture
def started(kfac: Kfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of one step with a relative data file, and another folder to stand in."""
    np.savez(tmp_path / "data.npz", x_train=X, y_train=X[:, 0])
    assert kfac(*BASE, "--out", "run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run"


def test_a_run_goes_on_from_another_folder(kfac: Kfac, started: Path) -> None:
    code, _, message = kfac("train", "--resume", started, "--steps", "2")
    assert code == 0, message


def test_a_run_goes_on_with_its_data_elsewhere(kfac: Kfac, started: Path) -> None:
    """The advice of the refusal works; other data does not, wherever it lies."""
    moved = started.parent / "moved.npz"
    (started.parent / "data.npz").rename(moved)
    code, _, message = kfac("train", "--resume", started, "--steps", "2")
    assert code == 2
    assert "problem.file=" in message
    code, _, message = kfac("train", "--resume", started, "--steps", "2", "--set", f"problem.file={moved}")
    assert code == 0, message
    np.savez(moved, x_train=X, y_train=X[:, 1])
    code, _, message = kfac("train", "--resume", started, "--steps", "3")
    assert code == 2
    assert "the data has changed" in message


@pytest.mark.parametrize(
    ("name", "arrays", "said", "likelihood"),
    [
        ("c.npz", {"y_train": CLASSES}, "y_train holds integers, 3 distinct ones, so the likelihood is", "categorical"),
        (
            "b.npz",
            {"y_train": (X > 0).astype("float32")},
            "y_train holds all 0 or 1, so the likelihood is",
            "bernoulli",
        ),
        ("r.npz", {"y_train": X}, "y_train holds real numbers, so the likelihood is", "gaussian"),
        ("a.npz", {}, "x_train holds real numbers, so the likelihood is", "gaussian"),
        ("t.csv", None, "y_train holds integers, 3 distinct ones, so the likelihood is", "categorical"),
    ],
)
def test_a_file_is_enough(
    kfac: Kfac,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arrays: dict[str, np.ndarray] | None,
    said: str,
    likelihood: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arrays is None:
        np.savetxt(name, np.c_[X, CLASSES], delimiter=",", header="a,b,c,d,e,kind", comments="")
    else:
        np.savez(name, x_train=X, **arrays)
    code, out, err = kfac("train", name, "--dry-run")
    assert code == 0, err
    assert f"{said} {likelihood} (--set likelihood=NAME chooses another)" in err
    assert f'likelihood = {{ kind = "{likelihood}"' in out
    if likelihood == "bernoulli":
        code, _, err = kfac("train", name, "--dry-run", "--set", "likelihood=gaussian")
        assert (code, err) == (0, "")


def test_a_function_trains_and_goes_on_from_another_folder(
    kfac: Kfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "own_net_of_the_test.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def problem(width=3):\n"
        "    x = torch.randn(40, 5)\n"
        "    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2)), (x, (x[:, 0] > 0).long())\n"
        "\ndef broken():\n    return undefined\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    flags = ("--steps", "2", "--out", "run", "--set", "problem.arguments.width=4")
    code, _, err = kfac("train", "own_net_of_the_test:problem", *flags)
    assert code == 0, err
    assert "the targets are integers, 2 distinct ones, so the likelihood is categorical" in err
    monkeypatch.chdir(tmp_path / "there")
    code, _, err = kfac("train", "--resume", str(tmp_path / "here" / "run"), "--steps", "3")
    assert code == 0, err
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = kfac("train", "own_net_of_the_test.py:broken")
    assert (code, out) == (2, "")
    assert "own_net_of_the_test.py, line 9, in broken: NameError: name 'undefined' is not defined" in err
    assert "Traceback" not in err
