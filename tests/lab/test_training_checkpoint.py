from __future__ import annotations

import dataclasses
import errno
import io
import os

import pytest
import torch

from kfacore.errors import DataError, ResourceError
from kfacore.lab.training import checkpoint as module
from kfacore.lab.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture
def state():
    return Checkpoint(
        model={"weight": torch.arange(1000.0)},
        optimizer={"steps": 3, "velocity": [torch.ones(2)]},
        averaged=None,
        step=3,
        seconds=1.5,
        evaluated=None,
        config={"steps": 9},
        data="abc",
    )


def test_round_trip(tmp_path, state):
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded.model["weight"], state.model["weight"])
    assert dataclasses.replace(loaded, model={}, optimizer={}) == dataclasses.replace(state, model={}, optimizer={})
    assert {"model", "optimizer", "format"} <= torch.load(tmp_path / "c.pt", weights_only=True).keys()


def test_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("damage", ["empty", "text", "short", "flipped"])
def test_damaged(tmp_path, state, damage):
    path = tmp_path / "c.pt"
    save_checkpoint(path, state)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        position = content.index(torch.arange(1000.0).numpy().tobytes()) + 100
        content[position] ^= 1
    path.write_bytes({"empty": b"", "text": b"hello", "short": content[:-500], "flipped": content}[damage])
    with pytest.raises(DataError, match=r"c\.pt (cannot be read|is damaged)"):
        load_checkpoint(path)


def test_foreign_files(tmp_path, state):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="not a checkpoint of kfac train"):
        load_checkpoint(tmp_path / "model.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="not a checkpoint of kfac train"):
        load_checkpoint(tmp_path / "list.pt")


def test_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_later_formats_are_refused(tmp_path, state, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    save_checkpoint(tmp_path / "c.pt", state)
    monkeypatch.undo()
    with pytest.raises(DataError, match=f"format {module.FORMAT + 1}, this version reads {module.FORMAT}"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, state, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, state)

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("builtins.open", lambda file, mode: Full(file, mode))
    with pytest.raises(ResourceError, match=r"c\.pt: No space left on device; free some space; go on with X"):
        save_checkpoint(path, dataclasses.replace(state, step=4), remedy="go on with X")
    monkeypatch.undo()
    assert load_checkpoint(path).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
