"""Runs that end by a budget of cases or seconds instead of steps."""

from __future__ import annotations

import pytest
from small_runs import events_of, run, small_config

from kfacore.errors import ConfigError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.loop import train
from kfacore.lab.training.resume import resume_config
from kfacore.registry import get_registry


def test_cases_end_a_run_with_an_evaluation_and_a_checkpoint(tmp_path) -> None:
    result = run(tmp_path, "a", "budget.cases=100", "eval.every=0", "checkpoint.every=0")
    steps = events_of(tmp_path / "a", "step")
    assert sum(event["batch_size"] for event in steps) >= 100
    assert sum(event["batch_size"] for event in steps[:-1]) < 100
    assert 1 < result.step < 20
    last = [event["event"] for event in events_of(tmp_path / "a")][-4:]
    assert last == ["step", "eval", "checkpoint", "done"]


def test_a_resumed_run_counts_the_cases_of_its_earlier_life(tmp_path) -> None:
    run(tmp_path, "whole", "budget.cases=200", "eval.every=0")
    run(tmp_path, "a", "steps=3", "eval.every=0")
    config = resume_config(get_registry(), tmp_path / "a", sets=["steps=20", "budget.cases=200"])
    train(config, registry=get_registry(), resume=tmp_path / "a")
    assert events_of(tmp_path / "a", "step") == events_of(tmp_path / "whole", "step")


def test_seconds_end_a_run(tmp_path) -> None:
    result = run(tmp_path, "a", "budget.seconds=1e-9")
    assert result.step == 1
    # Nothing is left to do in a second life.
    config = resume_config(get_registry(), tmp_path / "a")
    assert train(config, registry=get_registry(), resume=tmp_path / "a").step == 1
    longer = resume_config(get_registry(), tmp_path / "a", sets=["budget.seconds=1000.0"])
    assert train(longer, registry=get_registry(), resume=tmp_path / "a").step == 20


def test_steps_stay_the_limit_that_they_are(tmp_path) -> None:
    assert run(tmp_path, "a", "steps=2", "budget.cases=100000", "budget.seconds=1000.0").step == 2


@pytest.mark.parametrize("change", ["budget.cases=0", "budget.seconds=0.0", "budget.seconds=true", "budget.minutes=1"])
def test_slips(tmp_path, change) -> None:
    with pytest.raises(ConfigError, match=change.split("=")[0].replace(".minutes", "")):
        small_config(tmp_path, change)


def test_no_budget_by_default() -> None:
    assert resolve(get_registry()).budget.model_dump() == {"cases": None, "seconds": None}
