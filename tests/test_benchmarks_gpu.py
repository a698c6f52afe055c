"""`benchmarks/gpu.sh` on a CPU, small: every part runs with nothing but what the script brings; failures stay alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu import bring
from benchmarks.gpu.command import PARTS, _Session
from benchmarks.gpu.part import Part, time_steps
from benchmarks.gpu.refresh import newton_schulz, rotated

ROOT = Path(__file__).parents[1]
ABSENT = ["typer", "rich", "matplotlib", "safetensors", "sklearn", "scipy", "transformers", "tensorboard"]
"""Installed for development, and not on a machine that has torch alone."""


@pytest.mark.parametrize("parts", [["machine", "launches"], pytest.param(list(PARTS), marks=pytest.mark.slow)])
def test_every_part_runs_with_what_the_script_brings(tmp_path: Path, parts: list[str]) -> None:
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    for name in ABSENT:
        (blocked / f"{name}.py").write_text("raise ImportError('not on that machine')\n")
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": str(blocked)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), "--small", *(word for part in parts for word in ("--part", part))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    log = (out / "gpu.log").read_text() if (out / "gpu.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((out / "gpu.json").read_text())
    assert [(part["part"], part["outcome"]) for part in found["parts"]] == [(name, "done") for name in parts]
    titles = [table["title"] for table in found["tables"]]
    wanted = {"machine": ["machine", "rates"], "tests": ["tests"], "launches": ["launches"]}
    wanted |= {"mnist": ["step: autoencoder"], "gpt": ["step: GPT"], "resnet": ["step: residual"]}
    for begin in (title for part in parts for title in wanted.get(part, [])):
        assert any(title.startswith(begin) for title in titles), begin
    for table in found["tables"]:
        assert table["rows"], table["title"]
        assert not table.get("notes"), table["notes"]  # nothing failed, nothing was left out
        assert table["title"] in (out / "gpu.txt").read_text()


def test_the_record_makes_the_plug_ins_known(tmp_path: Path) -> None:
    bring.write_record(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("kfacore")
    assert (found.metadata["Name"], found.version) == ("kfacore", installed.version)
    assert list(found.entry_points) == [point for point in installed.entry_points if point.group == "kfac"]


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bring, "WHEELS", tmp_path / "bench-wheels")
    monkeypatch.setattr(bring, "missing", lambda *_: ["pydantic"])
    assert bring.main([str(tmp_path / "site")]) == 2
    said = capsys.readouterr().err
    assert "cannot import pydantic" in said
    assert "pydantic_core" in said
    assert f"--python-version {sys.version_info.major}.{sys.version_info.minor}" in said
    assert bring.missing is not None
    assert bring.main(["--command", "3.12"]) == 0
    assert "--python-version 3.12" in capsys.readouterr().out


def test_packages_that_cannot_be_imported_are_found(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemError('made for another version')\n")
    (tmp_path / "sound.py").write_text("")
    assert bring.missing(["json", "broken", "sound", "nowhere"], tmp_path) == ["broken", "nowhere"]


def test_a_part_that_hangs_is_ended() -> None:
    process = get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    assert _Session._end_of(process, 0.0) == "killed after 0 s"
    assert not process.is_alive()


def test_what_fails_is_noted_and_the_next_goes_on(tmp_path: Path) -> None:
    part = Part(torch.device("cpu"), True, time.monotonic() + PATIENCE, tmp_path / "rows")

    def fails() -> None:
        raise RuntimeError("CUDA out\nof memory")

    part.attempt("t", "first", fails)
    part.attempt("t", "second", lambda: part.row("t", x=1))
    late = Part(torch.device("cpu"), True, time.monotonic() - 1, tmp_path / "rows")
    late.attempt("t", "third", fails)
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert found[0]["note"] == "first: RuntimeError: CUDA out of memory"
    assert found[1]["row"] == {"x": 1}
    assert "left out" in found[2]["note"]


def test_steps_are_timed_in_whole_cycles_until_time_is_over() -> None:
    seen: list[int] = []
    cpu = torch.device("cpu")
    assert len(time_steps(seen.append, cpu, warmup=3, cycle=4, cycles=2, seconds=PATIENCE).ms) == 8
    assert seen == list(range(11))
    assert len(time_steps(seen.append, cpu, warmup=0, cycle=4, cycles=2, seconds=-1).ms) == 1
    with pytest.raises(TimeoutError, match="warm-up"):
        time_steps(seen.append, cpu, warmup=3, cycle=4, cycles=2, seconds=-1)


def test_methods_of_a_refresh_make_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    X = Y @ Y.T / 30 + 0.1 * torch.eye(20, dtype=torch.float64)
    later = X + 0.01 * torch.eye(20, dtype=torch.float64)
    wanted = torch.linalg.inv(later)
    for start in (torch.linalg.inv(X), torch.zeros_like(X)):  # a warm start, and one that is no inverse at all
        found, products = newton_schulz(later, start, tolerance=1e-10)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-8
        assert products < 60
    values, vectors = torch.linalg.eigh(X)
    kept, rotation = rotated(later, vectors)  # the same eigenvectors, in the order of their values
    assert torch.allclose(kept, values + 0.01)
    assert torch.allclose(rotation @ torch.diag(kept) @ rotation.T, later)
