from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from small_runs import events_of, run, small_config

from kfacore.errors import ResourceError
from kfacore.lab.training.loop import train
from kfacore.registry import get_registry

SINKS = 'sink=["jsonl", {kind="tensorboard", folder="tb"}]'


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def check_same(run_folder: Path) -> None:
    """Every number of the step and eval events is a scalar of the same name, and there are no others."""
    scalars = scalars_of(run_folder / "tb")
    expected: dict[str, dict[int, float]] = {}
    for event in events_of(run_folder, "step", "eval"):
        for name, value in event.items():
            if name not in ("event", "step", "notices") and value is not None:
                expected.setdefault(name, {})[event["step"]] = value
    assert set(scalars) == {*expected, "seconds"}
    for name, points in expected.items():
        assert scalars[name].keys() == points.keys(), name
        assert all(math.isclose(scalars[name][step], points[step], rel_tol=1e-6) for step in points), name


def test_names_and_numbers_are_those_of_the_events(tmp_path) -> None:
    run(tmp_path, "a", SINKS)
    check_same(tmp_path / "a")
    assert {"loss", "lam", "rho", "batch_size", "averaged_train_error"} <= set(scalars_of(tmp_path / "a" / "tb"))


def test_a_resumed_run_takes_back_what_was_after_its_checkpoint(tmp_path) -> None:
    class StopError(Exception):
        pass

    def stop(event):
        if event["event"] == "step" and event["step"] == 8:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, "a", SINKS, listeners=[stop])
    assert max(scalars_of(tmp_path / "a" / "tb")["loss"]) == 8
    train(small_config(tmp_path, SINKS, "steps=7"), registry=get_registry(), resume=tmp_path / "a")
    check_same(tmp_path / "a")
    assert max(scalars_of(tmp_path / "a" / "tb")["loss"]) == 7


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ResourceError, match=r"needs the package .*kfacore\[tensorboard\]"):
        run(tmp_path, "a", SINKS)


def test_writing_before_opening_is_a_defect_that_shows() -> None:
    with pytest.raises(ValueError, match="not open"):
        get_registry().build("sink", "tensorboard").write({"event": "step", "step": 1})
