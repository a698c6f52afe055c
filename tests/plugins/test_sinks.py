from __future__ import annotations

import errno
import json
import os

import pytest

from kfac_plugins.sinks import jsonl
from kfacore.errors import DataError, ResourceError


def write(folder, events, step=0):
    sink = jsonl.Jsonl()
    sink.open(folder, step=step)
    for event in events:
        sink.write(event)
    sink.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step(k, **more):
    return {"event": "step", "step": k, **more}


def test_one_strict_line_an_event(tmp_path):
    assert write(tmp_path, [step(1, loss=float("nan")), step(2, rho=float("-inf"), data="ö")]) == [
        step(1, loss=None), step(2, rho=None, data="ö"),
    ]  # fmt: skip


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    sink = jsonl.Jsonl()
    sink.open(tmp_path, step=0)
    sink.write(step(1))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "step", "step": 1}\n'
    sink.close()


def test_resuming_forgets_later_steps_and_the_end_of_the_earlier_life(tmp_path):
    write(tmp_path, [step(1), step(2), {"event": "eval", "step": 2}, step(3)])
    assert write(tmp_path, [step(3, new=True)], step=2)[2:] == [{"event": "eval", "step": 2}, step(3, new=True)]
    write(tmp_path, [{"event": "done", "step": 3}], step=3)
    assert [event["event"] for event in write(tmp_path, [step(4)], step=3)] == ["step", "step", "eval", "step", "step"]


def test_an_evaluation_that_the_checkpoint_did_not_know_of_is_there_once(tmp_path):
    """Stopped before the evaluation of step 2; the next life is killed between that and its checkpoint."""
    evaluation = {"event": "eval", "step": 2, "loss": 0.5}
    write(tmp_path, [step(1), step(2), evaluation])
    start = {"event": "start", "step": 2}
    assert write(tmp_path, [start, evaluation, step(3)], step=2) == [step(1), step(2), evaluation, start, step(3)]
    assert write(tmp_path, [evaluation | {"step": 3}], step=3)[-1] == evaluation | {"step": 3}
    assert write(tmp_path, [evaluation], step=1) == [step(1), evaluation]


def test_a_torn_line_is_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert write(tmp_path, [step(2)], step=1) == [step(1), step(2)]


def test_a_damaged_line_is_named_and_left_alone(tmp_path):
    content = '{"event": "step", "step": 1}\ngarbage\n{"event": "step", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged: line 2"):
        jsonl.Jsonl().open(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_full_disk(tmp_path, monkeypatch):
    sink = jsonl.Jsonl()
    sink.open(tmp_path, step=0)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"metrics\.jsonl: No space left on device; free some space"):
        sink.flush()
    sink.close()


def test_a_sink_must_be_opened_first():
    with pytest.raises(ValueError, match="not open"):
        jsonl.Jsonl().write(step(1))
