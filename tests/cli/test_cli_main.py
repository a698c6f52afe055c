"""The frame of the command: every error is a line and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from patience import PATIENCE

import kfac_cli.main as frame
import kfacore
from kfacore.errors import ConfigError, NumericalError, ResourceError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `main` in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["kfac", *arguments])
    with pytest.raises(SystemExit) as left:
        frame.main()
    return left.value.code or 0


def raising(error: BaseException):
    def app(**options: object) -> None:
        raise error

    return app


def test_version(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"kfac {kfacore.__version__}\n"


def test_help_names_every_command(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for module in frame.COMMANDS:
        assert f"  {module.rpartition('.')[2]} " in shown


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("unknown key 'x'"), 2, "error: unknown key 'x'\n"),
        (NumericalError("layer enc.0: NaN"), 3, "error: layer enc.0: NaN\n"),
        (ResourceError("no network"), 1, "error: no network\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
            1,
            "error: No space left on device (runs/a): free",
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/a"), 1, "error: Read-only file system (runs/a): choose"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 1, "error: Permission denied (runs/a): check"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "xx"),
            2,
            "error: File name too long (xx): choose",
        ),
        (OSError(errno.ELOOP, "Too many links", "a/b"), 2, "error: Too many links (a/b): a link leads"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "error: Not a directory (a/b): part"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, capsys, error, code: int, message: str) -> None:
    monkeypatch.setattr(frame, "app", raising(error))
    assert run(monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert len(captured.err.splitlines()) == (1 if message else 0)


def test_a_defect_leaves_its_traceback_in_a_file(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(frame.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(frame, "app", raising(RuntimeError("first line\nsecond line")))
    assert run(monkeypatch) == 1
    [line] = capsys.readouterr().err.splitlines()
    [file] = tmp_path.iterdir()
    assert line == f"error: unexpected second line (a defect of kfac or of a plug-in; traceback in {file})"
    text = file.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert "RuntimeError: first line" in text


def test_no_memory_is_no_defect() -> None:
    said = frame._unexpected(MemoryError("no 8 GB"))
    assert said.startswith("out of memory (MemoryError: no 8 GB): take smaller mini-batches")


def test_a_defect_where_no_file_can_be_written(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(frame.tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(frame, "app", raising(ValueError("bad")))
    assert run(monkeypatch) == 1
    assert "error: unexpected ValueError: bad (set KFAC_TRACEBACK=1" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("bad"), 1), (ConfigError("bad"), 2)])
def test_tracebacks_on_request(monkeypatch, capsys, error: Exception, code: int) -> None:
    monkeypatch.setenv("KFAC_TRACEBACK", "1")
    monkeypatch.setattr(frame, "app", raising(error))
    assert run(monkeypatch) == code
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].startswith("error: ")


def test_a_message_that_the_terminal_cannot_encode(monkeypatch) -> None:
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(frame, "app", raising(ConfigError("file 'größe.toml'")))
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(monkeypatch) == 2
    assert stream.buffer.getvalue() == b"error: file 'gr\\xf6\\xdfe.toml'\n"


def _kfac(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from kfac_cli.main import main; main()", *arguments]


@pytest.mark.skipif(os.name == "nt", reason="pipes break differently on Windows")
def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(_kfac("schema"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=PATIENCE) == 1
    assert errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            _kfac("schema"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: free some space or choose another folder\n"
