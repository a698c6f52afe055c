from __future__ import annotations

import json

import pytest
from small_runs import small_config

from kfacore.errors import ConfigError, DataError
from kfacore.lab.training.resume import resume_config
from kfacore.registry import get_registry


@pytest.fixture
def saved(tmp_path):
    config = small_config(tmp_path, "optimizer=adam")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.as_dict()))
    return tmp_path / "run", config


def test_without_changes_it_is_the_saved_one(saved):
    assert resume_config(get_registry(), saved[0]) == saved[1]
    assert resume_config(get_registry(), saved[0], flags={"steps": None, "optimizer": None}) == saved[1]


def test_harmless_changes(saved):
    config = resume_config(
        get_registry(),
        saved[0],
        flags={"steps": 30, "device": "cpu", "problem.data_dir": "d"},
        sets=["eval.every=7", "checkpoint.every=9", "threads=2", "pictures=true"],
    )
    assert (config.steps, config.device, config.problem.data_dir) == (30, "cpu", "d")
    assert (config.eval.every, config.checkpoint.every, config.threads, config.pictures) == (7, 9, 2, True)
    assert config.problem.sizes == saved[1].problem.sizes


def test_what_is_the_same_anyway_is_no_conflict(saved):
    again = resume_config(get_registry(), saved[0], flags={"optimizer": "adam", "seed": 0}, sets=["batch.start=20"])
    assert again == saved[1]


@pytest.mark.parametrize(
    ("flags", "sets", "message"),
    [
        (
            {"optimizer": "kfac"},
            [],
            r"--optimizer: a resumed run keeps its configuration, and .* has optimizer = 'adam'",
        ),
        ({"seed": 3}, [], r"--seed: .* has seed = 0"),
        ({}, ["optimizer.lr=0.5"], r"--set optimizer.lr=0.5: .* has optimizer.lr = 0.001"),
        ({"approx": "tridiag"}, [], r"--approx: .* has approx = None"),
        ({"preset": "paper"}, [], r"--preset: .* has preset = 'default'"),
        ({}, ["stepps=3"], r"unknown key 'stepps', did you mean 'steps'"),
    ],
)
def test_conflicts_are_named(saved, flags, sets, message):
    with pytest.raises(ConfigError, match=message):
        resume_config(get_registry(), saved[0], flags=flags, sets=sets)


def test_files_count_too(saved, tmp_path):
    (tmp_path / "c.toml").write_text("steps = 40\nweight_decay = 0.5\n")
    with pytest.raises(ConfigError, match=r"c\.toml: .* has weight_decay = 0"):
        resume_config(get_registry(), saved[0], files=[tmp_path / "c.toml"])
    (tmp_path / "c.toml").write_text("steps = 40\n")
    assert resume_config(get_registry(), saved[0], files=[tmp_path / "c.toml"]).steps == 40


def test_a_damaged_configuration(saved):
    file = saved[0] / "config.json"
    file.write_text(file.read_text().replace("weight_decay", "wait_decay"))
    with pytest.raises(DataError, match=r"config\.json is not the configuration of a run"):
        resume_config(get_registry(), saved[0])


def test_no_run(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        resume_config(get_registry(), tmp_path / "none")
