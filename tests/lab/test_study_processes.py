"""Runs of a study that are divided among processes: on this machine, and as tasks of a job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from small_runs import write_data
from small_studies import write_study

from kfacore.lab.studies.config import read_study
from kfacore.lab.studies.folder import plan_into, write_planned
from kfacore.lab.studies.plan import Study
from kfacore.lab.studies.state import read_state
from kfacore.registry import get_registry


def prepared(folder: Path, top: str) -> Study:
    study = plan_into(
        get_registry(), read_study(write_study(folder, steps=4, body="", seeds=1, top=top)), folder / "out"
    ).study
    study.write()
    study.write_index()
    for run in study.runs:
        write_planned(study, run)
    return study


SLURM = {"kind": "slurm", "cluster": "local"}
"""How submitit runs a job, and that a run starts its own processes, is tested without each other."""


@pytest.mark.parametrize("options", [{"kind": "local", "start": "spawn"}, pytest.param(SLURM, marks=pytest.mark.slow)])
def test_a_run_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    if options["kind"] == "slurm":
        pytest.importorskip("submitit")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    study = prepared(tmp_path, "processes = 2")
    (run,) = study.runs
    executor = get_registry().build("executor", options)
    executor.processes = study.processes
    executor.open(study.folder, threads=1)
    try:
        executor.submit(run.hash)
        limit, ended = time.monotonic() + PATIENCE, []
        while not ended and time.monotonic() < limit:
            ended = list(executor.poll(0.5))
    finally:
        executor.close()
    log = study.folder / "state" / run.hash / "log.txt"
    said = log.read_text() if log.exists() else ""
    assert read_state(study.folder, run.hash).state == "done", said[-3000:]
    assert ended[0].code == 0
    assert '"processes": 2' in (run.path / "manifest.json").read_text()


def test_the_hash_says_how_many_processes(tmp_path: Path) -> None:
    write_data(tmp_path)
    hashes = {}
    for top in ("", "processes = 1", "processes = 2"):
        study = plan_into(get_registry(), read_study(write_study(tmp_path, body="", top=top)), tmp_path / "out").study
        hashes[top] = study.runs[0].hash
        assert study.processes == (2 if top.endswith("2") else 1)
    assert hashes[""] == hashes["processes = 1"] != hashes["processes = 2"]
