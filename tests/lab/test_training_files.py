from __future__ import annotations

import errno
import json
import os

import pytest

from kfacore.errors import ConfigError, ResourceError
from kfacore.lab.training.files import atomic_write, disk_errors, plain, read_events, require_folder, write_json


def test_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, refuse if failing == "write" else lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "--out")])
def test_disk_errors_say_what_to_do(tmp_path, number, advice):
    with pytest.raises(ResourceError) as caught, disk_errors(tmp_path / "x", "go on with Y"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert os.strerror(number) in message
    assert advice in message
    assert "go on with Y" in message
    assert str(tmp_path / "x") in message


def test_a_closed_pipe_is_no_disk_error(tmp_path):
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path):
        raise BrokenPipeError


def test_json_is_strict(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"nan": float("nan"), "inf": [float("-inf"), 1.5], "path": tmp_path, "text": "ö"})
    loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert loaded == {"nan": None, "inf": [None, 1.5], "path": str(tmp_path), "text": "ö"}
    assert plain((1, {"a": True})) == [1, {"a": True}]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert [event for _, event in read_events(path)] == [{"event": "step", "step": 1}]
    assert next(read_events(path))[0] == 29
    assert list(read_events(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"event": "step"}', "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"event": "step", "step": 1}}\n{line}\n{{"event": "step", "step": 2}}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(read_events(path))


def test_a_folder_below_a_file_or_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to("round")
    require_folder(tmp_path / "new" / "inner", "take another")
    require_folder(tmp_path, "take another")
    for name, what in (("file", "a file"), ("link", "a link to nothing"), ("round", "a link to nothing")):
        for folder in (tmp_path / name, tmp_path / name / "inner" / "most"):
            with pytest.raises(ConfigError, match=f"{name} is {what}; take another"):
                require_folder(folder, "take another")
