"""The executors for real: processes that are forked, spawned, and sent through submitit's local mode."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE, until
from small_studies import write_study

from kfac_plugins.executors.slurm import Job
from kfacore.errors import ConfigError, ResourceError
from kfacore.lab.studies.config import read_study
from kfacore.lab.studies.folder import plan_into, write_planned
from kfacore.lab.studies.plan import Study
from kfacore.lab.studies.state import own_plan, read_journal, read_state, state_folder
from kfacore.lab.training.files import write_json
from kfacore.registry import get_registry
from kfacore.roles import Ended, Executor


def prepared(tmp_path: Path, **options: Any) -> Study:
    """A study whose runs are written down for the processes."""
    study = plan_into(get_registry(), read_study(write_study(tmp_path, body="", **options)), tmp_path / "out").study
    study.write()
    study.write_index()
    for run in study.runs:
        write_planned(study, run)
    return study


def wait_for(executor: Executor, count: int) -> dict[str, Ended]:
    ended: dict[str, Ended] = {}
    limit = time.monotonic() + PATIENCE
    while len(ended) < count:
        assert time.monotonic() < limit, "no end in sight"
        ended.update({end.run: end for end in executor.poll(0.5)})
    return ended


def wait_for_step(study: Study, run: int, step: int) -> None:
    metrics = study.runs[run].path / "metrics.jsonl"
    until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())


def pid_of(study: Study, run: int) -> int:
    return int(read_journal(study.folder, study.runs[run].hash)[-1]["pid"])


LONG = 100_000


# The harder of the two in every run of the tests; each test starts several processes, which import torch.
@pytest.fixture(params=[pytest.param("heard", marks=pytest.mark.slow), "ignored"])
def sigint(request) -> Iterator[None]:
    """Started like ``make test &`` in a script, where SIGINT is ignored here and in all that is started from here."""
    before = signal.getsignal(signal.SIGINT)
    if request.param == "ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_signals_are_heard(pid: int) -> None:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    assert not ignored & (1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1)


def test_forked(tmp_path, sigint) -> None:
    study = prepared(tmp_path, seeds=4, steps=4, pictures=True)
    executor = get_registry().build("executor", {"kind": "local", "start": "fork", "workers": 2})
    executor.open(study.folder, threads=1)
    try:
        for run in study.runs[:2]:
            executor.submit(run.hash)
        assert {end.code for end in wait_for(executor, 2).values()} == {0}
        first, second = (pid_of(study, index) for index in (0, 1))
        assert len({first, second, os.getpid()}) == 3
        assert (study.runs[0].path / "plots" / "progress.png").exists()
        # A run that had its end is not run again.
        executor.submit(study.runs[0].hash)
        assert wait_for(executor, 1)[study.runs[0].hash].code == 0
        assert len(read_journal(study.folder, study.runs[0].hash)) == 2
        # The process that forks is killed: the run under way notices, saves and frees itself, and can go on.
        for run in study.runs[2:]:
            plan = own_plan(state_folder(study.folder, run.hash))
            config = json.loads(plan.read_text())
            config["config"]["steps"] = LONG
            write_json(plan, config)
        executor.submit(study.runs[2].hash)
        wait_for_step(study, 2, 2)
        assert_signals_are_heard(pid_of(study, 2))
        stat = Path(f"/proc/{pid_of(study, 2)}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        end = wait_for(executor, 1)[study.runs[2].hash]
        assert end.again
        assert "the process that starts the runs has ended with code -9" in end.reason
        until(lambda: read_state(study.folder, study.runs[2].hash).state != "running")
        assert read_journal(study.folder, study.runs[2].hash)[-1]["what"] == "stopped"
        # The next run starts a new one; and nothing is left behind.
        executor.submit(study.runs[3].hash)
        wait_for_step(study, 3, 2)
    finally:
        executor.close()
    until(lambda: not alive(pid_of(study, 3)))


def test_spawned_and_stopped(tmp_path, sigint) -> None:
    study = prepared(tmp_path, seeds=1, steps=LONG)
    executor = get_registry().build("executor", {"kind": "local", "start": "spawn"})
    executor.open(study.folder, threads=1)
    try:
        name = study.runs[0].hash
        executor.submit(name)
        wait_for_step(study, 0, 2)
        assert_signals_are_heard(pid_of(study, 0))
        executor.stop()
        assert wait_for(executor, 1)[name].code == 143
        assert read_state(study.folder, name).state == "pending"
        assert read_journal(study.folder, name)[-1]["what"] == "stopped"
        assert (study.runs[0].path / "checkpoint.pt").exists()
    finally:
        executor.close()


def slurm(**options: Any) -> Executor:
    return get_registry().build("executor", {"kind": "slurm", "cluster": "local", **options})


# submitit leaves the controller's Popen of a finished job to the garbage collector.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_submitit_for_real_with_a_preemption(tmp_path, sigint) -> None:
    study = prepared(tmp_path, seeds=1, steps=LONG)
    name = study.runs[0].hash
    executor = slurm()
    executor.open(study.folder, threads=1)

    def whats() -> list[str]:
        return [line["what"] for line in read_journal(study.folder, name)]

    try:
        executor.submit(name)
        wait_for_step(study, 0, 5)
        os.kill(pid_of(study, 0), signal.SIGUSR2)  # how SLURM announces that it will take the machine away
        until(lambda: "resumed" in whats())
        wait_for_step(study, 0, read_journal(study.folder, name)[1]["step"] + 1)
        executor.stop()
        assert wait_for(executor, 1)[name].code == 143
    finally:
        executor.close()
    assert read_state(study.folder, name).state == "pending"
    assert whats() == ["started", "stopped", "resumed", "stopped"]
    journal = read_journal(study.folder, name)
    assert journal[1]["step"] >= 5, "it has saved before it left"
    assert journal[3]["step"] > journal[1]["step"], "it went on from there"
    assert journal[1]["pid"] != journal[2]["pid"], "in another job"


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kind": "slurm", "cluster": "local"}, id="slurm"),
        pytest.param({"kind": "local", "start": "fork"}, id="fork", marks=pytest.mark.slow),
        pytest.param({"kind": "local", "start": "spawn"}, id="spawn", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_behind(tmp_path, sigint, options) -> None:
    study = prepared(tmp_path, seeds=1, steps=LONG)
    executor = get_registry().build("executor", options)
    executor.open(study.folder, threads=1)
    try:
        executor.submit(study.runs[0].hash)
        wait_for_step(study, 0, 2)
        pid = pid_of(study, 0)
        assert_signals_are_heard(pid)
    finally:
        executor.close()
    until(lambda: not alive(pid))


def test_a_preemption_in_the_middle_of_a_checkpoint(tmp_path, monkeypatch) -> None:
    study = prepared(tmp_path, seeds=1, steps=LONG)
    name, save = study.runs[0].hash, torch.save
    states: list[str] = []

    def put_back(number: int, frame: object) -> None:  # submitit's handler leaves from wherever the process is
        states.append(read_state(study.folder, name).state)
        raise SystemExit(144)

    def save_announced(*given: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGUSR2)
        save(*given, **options)

    before = signal.signal(signal.SIGUSR2, put_back)
    monkeypatch.setattr(torch, "save", save_announced)
    try:
        with pytest.raises(SystemExit, match="144"):
            Job(study.folder, name)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert states == ["pending"], "the run was saved and free before the job went back"
    assert [line["what"] for line in read_journal(study.folder, name)] == ["started", "stopped"]
    assert (study.runs[0].path / "checkpoint.pt").exists()


def test_slurm_says_what_is_missing(tmp_path, monkeypatch) -> None:
    with pytest.raises(ResourceError, match=r"no jobs can be sent to SLURM from this machine.*--executor local"):
        get_registry().build("executor", "slurm").open(tmp_path, threads=1)
    executor = slurm()
    executor.config = executor.config.model_copy(update={"minutes": "long"})
    with pytest.raises(ConfigError, match="submitit refuses an option"):
        executor.open(tmp_path, threads=1)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ResourceError, match=r"pip install 'kfacore\[slurm\]'"):
        slurm().open(tmp_path, threads=1)


def test_an_executor_must_be_opened() -> None:
    with pytest.raises(ValueError, match="opened first"):
        get_registry().build("executor", "local").submit("run")
