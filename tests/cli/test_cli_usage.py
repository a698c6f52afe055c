"""Slips on the command line: one line in the style of all other errors, with the nearest right name, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from kfac_cli.main import app, main


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


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for name, command in group.commands.items():
        yield from commands(command, (*path, name)) if hasattr(command, "commands") else [((*path, name), command)]


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_names_every_value(words: tuple[str, ...]) -> None:
    for parameter in COMMANDS[words].params:
        if not getattr(parameter, "is_flag", False):
            assert parameter.metavar, parameter.opts


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("words", [("train",), ("study", "run")], ids=" ".join)
def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys, columns: int, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert call(monkeypatch, *words, "--help") == 0
    widest = max(map(len, capsys.readouterr().out.splitlines()))
    assert columns - 22 < widest <= columns  # a line is as full as its words allow


def test_help_says_where_names_are_listed(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    call(monkeypatch, "train", "--help")
    shown = capsys.readouterr().out
    for slot in ("problem", "approx", "damping", "momentum", "optimizer"):
        assert f"--{slot} NAME" in shown
        assert f"kfac list {slot} has all" in shown
