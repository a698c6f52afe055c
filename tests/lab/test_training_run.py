from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfacore.errors import ConfigError, DataError, ResourceError
from kfacore.lab.training.run import RunFolder, default_folder


def test_default_folders_do_not_collide(tmp_path):
    first = default_folder("curves", "tridiag", tmp_path)
    assert first.name.startswith("curves-tridiag-")
    first.mkdir()
    second = default_folder("curves", "tridiag", tmp_path)
    assert second != first
    assert not second.exists()


def test_create_and_read_back(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.create({"steps": 3}, {"seed": 0})
    folder.unlock()
    assert folder.read_config() == {"steps": 3}
    assert folder.read_manifest() == {"seed": 0}
    assert folder.events() == []
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.json", "manifest.json"]


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "metrics.jsonl"])
def test_a_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"holds another run.*--resume"):
        RunFolder(tmp_path).create({}, {})
    assert (tmp_path / name).read_text() == "{}"


def test_a_folder_with_other_things_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    folder.create({}, {})
    folder.unlock()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "f").check_free()


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=r"Read-only file system; choose a folder.*--out"):
        RunFolder(tmp_path / "run").create({}, {})


def test_a_run_in_progress_is_refused_to_other_processes(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create({}, {})
    code = f"import kfacore.lab.training.run as r; r.RunFolder({str(tmp_path)!r}).lock()"
    busy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being trained by another process" in busy.stderr
    folder.unlock()
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "holds no table"), (b"\xff\xfe", "cannot be read")],
)
def test_damaged_configurations(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        RunFolder(tmp_path).read_config()


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        RunFolder(tmp_path / "none").read_config()


def test_damaged_metrics_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\nxx\n{"event": "step", "step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged: line 2"):
        RunFolder(tmp_path).events()
