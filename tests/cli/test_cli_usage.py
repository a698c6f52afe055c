"""Slips on the command line: one line in the style of all other errors, with the nearest right name, exit code 2."""

from __future__ import annotations

import sys

import pytest

from kfac_cli.main import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kfac", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "kfac: unknown command 'trian', did you mean 'train'?"),
        ("xyz", "kfac: unknown command 'xyz', known: data, doctor, "),
        ("data lst", "kfac data: unknown command 'lst', did you mean 'list'?"),
        ("list --jsno", "kfac list: unknown option '--jsno', did you mean '--json'?"),
        ("train --stepz 3", "kfac train: unknown option '--stepz', did you mean '--steps'?"),
        ("train --version", "kfac train: unknown option '--version'; kfac train --help shows what it takes"),
        ("train curves adam", "kfac train: unexpected argument 'adam', did you mean '--optimizer adam'?"),
        ("train --seed 1 adam", "kfac train: 'adam' is no problem, did you mean '--optimizer adam'?"),
        ("train curvs", "--problem: unknown problem 'curvs', did you mean 'curves'?"),
        ("train curves --problem mnist", "--problem mnist: the problem is named twice, also as curves; leave one out"),
        ("train a b", "kfac train: unexpected argument 'b'; kfac train --help shows what it takes"),
        ("train --steps abc", "kfac train: --steps abc: input should be a valid integer"),
        ("train --steps=1.5", "kfac train: --steps 1.5: input should be a valid integer"),
        ("train --problem", "option '--problem' requires an argument"),
        ("show", "kfac show: missing argument 'SLOT/NAME'; kfac show --help shows what it takes"),
    ],
)
def test_one_line_with_the_nearest_right_name(monkeypatch, capsys, line: str, message: str) -> None:
    assert call(monkeypatch, *line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("line", ["", "data"])
def test_without_arguments_there_is_help(monkeypatch, capsys, line: str) -> None:
    assert call(monkeypatch, *line.split()) == 2
    captured = capsys.readouterr()
    assert "Usage: kfac" in captured.out + captured.err
    assert not captured.err.startswith("error")
