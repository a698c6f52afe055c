"""`benchmarks/real`: choices, budgets and answers, on data made up here; the real files are nobody's need."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.real import race
from benchmarks.real.command import main
from benchmarks.real.methods import METHODS, RATES, Method, start
from benchmarks.real.race import Run, choose, final
from benchmarks.real.table import rows
from benchmarks.real.tasks import MODELS, absent, build
from kfac_plugins.optimizers.muon import Muon, orthogonalised


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Thirty images of noise in three classes, where clipart32.npz is looked for."""
    draws = np.random.default_rng(0)
    parts = {f"x_{part}": draws.integers(0, 255, (30, 3, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "clipart32.npz", **parts, y_train=np.arange(30) % 3, y_test=np.arange(30) % 3)
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_on_a_convolutional_net(method: str, data: Path) -> None:
    task = build("cnn", data, 10, 0)
    before = [p.detach().clone() for p in task.model.parameters()]
    running = start(method, task.model, RATES[method][0] if RATES[method] else None)
    for share in (0.0, 0.2, 0.9):
        running.schedule(share)
        stepped = running.step(task.x[:10], task.y[:10])
    assert np.isfinite(stepped.loss)
    assert any(not torch.equal(p, old) for p, old in zip(task.model.parameters(), before, strict=True))


def test_what_is_missing_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--model", "gpt"]) == 2
    assert "gpt needs tinyshakespeare.txt, which is not in" in capsys.readouterr().err
    assert all(absent(name, tmp_path) for name in MODELS)


def test_a_race_is_kept_and_gone_on_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "real.json"
    monkeypatch.setitem(RATES, "adamw", (1e-3,))
    given = ["--data", str(data), "--model", "cnn", "--method", "adamw", "--method", "kfac", "--seconds", "0.05"]
    given += ["--out", str(out), "--picture", str(tmp_path / "real.png")]
    assert main(given) == 0
    runs = json.loads(out.read_text())["runs"]
    assert {run["method"] for run in runs} == {"adamw", "kfac"}
    assert all(run["error"] is None and run["steps"] and run["curve"][-1][1] >= run["seconds"] for run in runs)
    monkeypatch.setattr("benchmarks.real.store.race", lambda run, data: pytest.fail("ran again"))
    assert main(given) == 0
    assert (tmp_path / "real.png").stat().st_size > 1000


def _record(run: Run, losses: list[float], error: str | None = None) -> dict[str, Any]:
    curve = [[10 * i, 1.0 * i, loss, loss] for i, loss in enumerate(losses)]
    return {**vars(run), "steps": 10 * (len(losses) - 1), "undone": 0, "error": error, "curve": curve}


def test_rates_are_chosen_before_mini_batches_and_the_guest_gets_adamws() -> None:
    def done(run: Run) -> dict[str, Any]:
        loss = abs((run.rate or 0.0) - 4e-3) + (0.0 if run.batch == MODELS["gpt"].batches[1] else 0.1)
        return _record(run, [9.0, loss])

    assert choose("gpt", "adamw", 1.0, done) == (MODELS["gpt"].batches[1], 4e-3)
    assert choose("gpt", "guest", 1.0, done) == (MODELS["gpt"].batches[1], 4e-3)
    assert choose("gpt", "kfac", 1.0, done) == (MODELS["gpt"].batches[1], None)


def test_shares_are_those_of_adamws_run() -> None:
    base = _record(Run("gpt", "adamw", 8, 1e-3, 4.0, 0), [4.0, 3.0, 2.5, 2.2, 2.0])
    own = _record(Run("gpt", "kfac", 8, None, 4.0, 0), [4.0, 2.1, 1.9, 1.8])
    late = _record(Run("gpt", "soap", 8, 1e-3, 4.0, 0), [4.0, 3.0])
    first, second, third = rows([base, own, late])
    assert (first["share of its steps"], first["share of its seconds"]) == (1.0, 1.0)
    assert (second["steps to AdamW's"], second["share of its steps"], second["share of its seconds"]) == (20, 0.5, 0.5)
    assert third["share of its steps"] is None
    assert final(_record(Run("gpt", "soap", 8, 1e-3, 4.0, 0), [4.0], "ValueError: no")) == float("inf")


def test_a_run_that_fails_says_so_and_ends_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Any, y: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(race, "start", lambda *given: Method(broken, lambda share: None))
    found = race.race(Run("cnn", "adamw", 10, 1e-3, 0.01, 0), data)
    assert found["error"] == "ValueError: no"
    assert final(found) == float("inf")


def test_muon_takes_kernels_as_matrices() -> None:
    kernel = nn.Parameter(torch.zeros(4, 2, 3, 3))
    kernel.grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    Muon([kernel], lr=1.0).step()
    expected = -0.2 * 18**0.5 * orthogonalised(kernel.grad.flatten(1) * (0.05 + 0.95 * 0.05) / 1.0)
    torch.testing.assert_close(kernel.detach().flatten(1), expected)
