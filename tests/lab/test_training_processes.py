"""One run on several processes: one folder, one voice, the numbers of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from small_runs import KEYS, events_of, run, settings, write_data
from torch import distributed as dist
from world_training import stopped, trained
from worlds import world

from kfacore.errors import ConfigError
from kfacore.lab.training.checkpoint import load_checkpoint
from kfacore.lab.training.processes import device_of, joined, started, told_first

DOUBLE = 'dtype="float64"'


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events_of(folder, "step")]


def test_a_run_on_two_processes_is_the_run_on_one_and_goes_on_with_three(tmp_path: Path) -> None:
    one = run(tmp_path, "one", DOUBLE)
    first, second = world(2, trained, tmp_path, "two", [DOUBLE, "steps=10"], {}).results
    assert first[0] == second[0] == 10
    assert first[1] == second[1]
    assert first[2][-1] == "done"
    assert not second[2]
    again = world(3, trained, tmp_path, "two", [DOUBLE], {"resume": tmp_path / "two"}).results
    assert [each[0] for each in again] == [20, 20, 20]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-7)
    assert [again[0][1][key] for key in KEYS] == pytest.approx([one.measures[key] for key in KEYS], rel=1e-7)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_a_signal_on_one_process_stops_all_after_the_step_saved(tmp_path: Path) -> None:
    write_data(tmp_path)
    for each in world(2, stopped, tmp_path, "run", ["checkpoint.every=0"]).results:
        assert each[0] == "Terminated"
        assert each[2] == 143
        assert f"stopped by SIGTERM after step {load_checkpoint(tmp_path / 'run' / 'checkpoint.pt').step}" in each[1]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").step == 8


def test_what_cannot_be_shared_is_refused_on_all(tmp_path: Path) -> None:
    write_data(tmp_path)
    for more, said in ((['optimizer="sgd"'], "runs in one process"), (["batch.start=1"], "less than one example")):
        for each in world(2, trained, tmp_path, "run", more, {}).results:
            assert each[0] == "ConfigError"
            assert said in each[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # three processes that import torch; how the first is found is tested without them
def test_the_command_under_torchrun_says_an_error_once(tmp_path: Path) -> None:
    write_data(tmp_path)
    sets = [word for each in settings(tmp_path, 'problem.file="nothing.npz"') for word in ("--set", each)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kfac_cli", "train", "--out", str(tmp_path / "run"), *sets]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "nothing.npz" in done.stderr


def test_of_the_processes_of_torchrun_the_first_to_ask_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", **place}.items():
        monkeypatch.setenv(key, value)
    assert [told_first(), told_first()] == [True, False]


def test_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started({}) == started({"WORLD_SIZE": "1"}) == 1
    whole = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert started(whole) == 4
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        started({key: value for key, value in whole.items() if key != "MASTER_PORT"})
    assert device_of("cpu") == "cpu"
    assert told_first()
    with joined() as ranks:
        assert ranks.alone


def test_a_configuration_for_several_processes_is_not_run_on_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        run(tmp_path, "run", "processes=2")
    assert not (tmp_path / "run").exists()
