"""Every built-in problem, optimizer, sink and executor passes its role's suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from late import Late

from kfac_plugins.problems import curve_images
from kfac_plugins.problems.curve_images import draw_curves
from kfacore.lab.data import sha256_of_arrays
from kfacore.registry import get_registry
from kfacore.testing import ComponentSuite, ExecutorSuite, OptimizerSuite, ProblemSuite, SinkSuite

event_accumulator = Late("tensorboard.backend.event_processing.event_accumulator")


class TestKfac(OptimizerSuite):
    name = "kfac"


class TestKfacWithEverythingElse(OptimizerSuite):
    name = "kfac"
    likelihood = "categorical"
    parts: ClassVar[dict[str, Any]] = {
        "approx": {"kind": "tridiag", "refresh_every": 3},
        "estimator": {"kind": "exact", "tau1": 1.0},
        "damping": {"kind": "fixed", "lambda0": 0.5},
        "momentum": {"kind": "fixed", "lr": 0.3, "mu": 0.5},
    }


class TestNesterov(OptimizerSuite):
    name = "nesterov"


class TestSgd(OptimizerSuite):
    name = "sgd"
    likelihood = "bernoulli"


class TestAdam(OptimizerSuite):
    name = "adam"
    options: ClassVar[dict[str, Any]] = {"lr": 0.01}


class TestAdamW(OptimizerSuite):
    name = "adamw"
    options: ClassVar[dict[str, Any]] = {"lr": 0.01}


class TestMuon(OptimizerSuite):
    name = "muon"
    options: ClassVar[dict[str, Any]] = {"lr": 0.01}


class TestGuest(OptimizerSuite):
    name = "guest"
    likelihood = "categorical"
    options: ClassVar[dict[str, Any]] = {"lr": 0.01, "every": 3}


class TestGuestAroundMuon(OptimizerSuite):
    name = "guest"
    options: ClassVar[dict[str, Any]] = {"base": "muon", "lr": 0.01, "scale": "kl"}
    parts: ClassVar[dict[str, Any]] = {"approx": {"kind": "tridiag", "power": 0.5}, "estimator": "empirical"}


class TestJsonl(SinkSuite):
    name = "jsonl"
    keys = ("event", "step", "batch_size", "loss", "seconds")

    def events(self, run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class TestTensorboard(SinkSuite):
    name = "tensorboard"
    keys = ("step", "loss")  # numbers only, by the step

    def events(self, run: Path) -> list[dict[str, Any]]:
        accumulator = event_accumulator.EventAccumulator(
            str(run / self.make_config().folder), size_guidance={"scalars": 0}
        )
        accumulator.Reload()
        if "loss" not in accumulator.Tags()["scalars"]:
            return []
        return [{"step": event.step, "loss": event.value} for event in accumulator.Scalars("loss")]


class TestCurves(ProblemSuite):
    name = "curves"

    @pytest.fixture(autouse=True)
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first 60 images instead of 30,000."""
        images = draw_curves(60)
        monkeypatch.setattr(curve_images, "TRAIN_CASES", 40)
        monkeypatch.setattr(curve_images, "TEST_CASES", 20)
        monkeypatch.setattr(curve_images, "CHECKSUM", sha256_of_arrays(images[40:], images[:40]))


def made_up_mnist(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "mnist.npz",
        x_train=rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        y_train=np.arange(20) % 10,
        x_test=rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        y_test=np.arange(4) + 6,
    )
    return {"data_dir": str(folder), "verify": False}


class TestMnist(ProblemSuite):
    name = "mnist"
    reads_files = True

    def data(self, folder: Path) -> dict[str, Any]:
        return made_up_mnist(folder)


class TestMnist16Classifier(ProblemSuite):
    name = "mnist16-classifier"
    reads_files = True

    def data(self, folder: Path) -> dict[str, Any]:
        return made_up_mnist(folder)


class TestFaces(ProblemSuite):
    name = "faces"
    reads_files = True

    def data(self, folder: Path) -> dict[str, Any]:
        coarse = np.random.default_rng(0).random((40, 8, 8))
        images = (coarse.repeat(8, 1).repeat(8, 2) * 240).astype(np.uint8)
        np.savez(folder / "olivetti.npz", images=images, person=np.arange(40))
        return {"data_dir": str(folder), "patches_per_image": 2}


class TestNpzAutoencoder(ProblemSuite):
    name = "npz"
    reads_files = True
    sizes_from_data = True

    def data(self, folder: Path) -> dict[str, Any]:
        x = np.random.default_rng(0).random((30, 4, 5)).astype(np.float32)
        np.savez(folder / "mine.npz", x_train=x[:20], x_test=x[20:])
        return {"file": str(folder / "mine.npz"), "sizes": [6, 3, 6]}


class TestNpzRegression(ProblemSuite):
    name = "npz"
    reads_files = True
    sizes_from_data = True

    def data(self, folder: Path) -> dict[str, Any]:
        x = np.random.default_rng(0).random((30, 7))
        np.savez(folder / "mine.npz", x_train=x, y_train=x[:, :2])
        return {"file": str(folder / "mine.npz"), "sizes": [6]}


class Executors(ExecutorSuite):
    """What `tests/lab/test_study_executors.py` sees of both is slow here: every test starts processes with torch."""

    @pytest.mark.slow
    def test_a_run_that_has_ended_is_not_run_again(self, tmp_path: Path) -> None:
        super().test_a_run_that_has_ended_is_not_run_again(tmp_path)

    @pytest.mark.slow
    def test_stop_saves_what_is_under_way(self, tmp_path: Path) -> None:
        super().test_stop_saves_what_is_under_way(tmp_path)

    @pytest.mark.slow
    def test_close_ends_what_is_left(self, tmp_path: Path) -> None:
        super().test_close_ends_what_is_left(tmp_path)


class TestLocal(Executors):
    name = "local"

    @pytest.mark.slow
    def test_every_run_is_executed_and_told_once(self, tmp_path: Path) -> None:
        super().test_every_run_is_executed_and_told_once(tmp_path)


# submitit leaves the controller's Popen of a finished job to the garbage collector.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
class TestSlurm(Executors):
    name = "slurm"
    options: ClassVar[dict[str, Any]] = {"cluster": "local"}


def test_no_built_in_is_left_out() -> None:
    suites = [value for value in globals().values() if isinstance(value, type) and issubclass(value, ComponentSuite)]
    tested = {(suite.slot, suite.name) for suite in suites if suite.__name__.startswith("Test")}
    built_in = {
        (slot, component.name)
        for slot in ("problem", "optimizer", "sink", "executor")
        for component in get_registry().components(slot)
        if component.target.startswith(("kfac_plugins.", "kfacore."))
    }
    elsewhere = {("problem", name) for name in ("shakespeare", "text", "images", "python")}  # test_problem_*.py
    assert built_in <= tested | elsewhere
