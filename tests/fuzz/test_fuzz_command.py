"""Command lines and manifests that make no sense: one line and the exit code of the reason, and the rest works."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from fuzzing import examples
from hypothesis import strategies as st
from small_runs import settings, write_data

from kfac_cli.main import app, main
from kfacore.plugin import SLOTS
from kfacore.registry import get_registry, reset_registry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data, a configuration, a finished run and a file of something else."""
    folder = tmp_path_factory.mktemp("commands")
    write_data(folder)
    (folder / "small.toml").write_text("\n".join(settings(folder, "sink=[]")))
    assert command(folder, "train", "-c", "small.toml", "--steps", "1", "--out", "run")[0] == 0
    (folder / "noise").write_bytes(bytes(range(256)))
    return folder


def command(folder: Path, *words: str) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["kfac", *words])
        patch.setenv("KFAC_DATA", str(folder))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0), out.getvalue(), err.getvalue()


def leaves(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, inner in group.commands.items():
        found += leaves(inner, (*path, name)) if hasattr(inner, "commands") else [((*path, name), inner)]
    return found


# What downloads stays out; so does what runs for long by right: studies are planned only, inspections named only.
COMMANDS = {words: each for words, each in leaves(typer.main.get_command(app)) if words != ("data", "fetch")}
HELD: dict[tuple[str, ...], tuple[str, ...]] = {
    ("train",): ("-c", "small.toml", "--set", "steps=1", "--dry-run"),
    ("inspect",): ("--approx", "no-such"),
    ("study", "run"): ("--dry-run",),
}
WORDS = [
    "run", "noise", "data.npz", "small.toml", "nowhere", ".", "", "-", "--", "0", "1", "-1", "1e400", "nan", "x=1", "=",
    "approx=", "problem.sizes=[1", "approx/tridiag", "figure3", "figure1", "a:b", "ä\0", "\udcff", "tridiag", "x" * 300,
]  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, ...]:
    """A command with some of its own options and others, and values that fit and do not."""
    path = draw(st.sampled_from(sorted(COMMANDS)))
    options = [option for parameter in COMMANDS[path].params for option in parameter.opts if option.startswith("-")]
    word = st.one_of(st.sampled_from(options or ["--help"]), st.sampled_from(WORDS), st.text(max_size=6))
    return (*path, *HELD.get(path, ()), *draw(st.lists(word, max_size=4)))


numbers = itertools.count()


@examples(lines())
def test_a_command_line_is_answered_or_refused_in_a_line(folder: Path, line: tuple[str, ...]) -> None:
    if "\0" in "".join(line):  # no system hands such a word over
        line = tuple(word.replace("\0", "") for word in line)
    code, out, err = command(folder, *line)
    assert code in (0, 1, 2, 3, 4), (code, err)
    assert "Traceback" not in out + err
    assert "unexpected " not in err or "unexpected argument" in err, err
    if code == 2 and not err.startswith("Usage"):
        assert "error: " in err, err


# --- manifests -------------------------------------------------------------------------------------------------------

HEAD = """
from typing import Any, ClassVar, Literal
from pydantic import BaseModel
from kfacore.plugin import *
from kfacore.plugin import Component, hookimpl
from kfacore.schema.slots import *
from kfac_plugins.approx import BlockDiagonalConfig

class Config({base}):
    kind: {kind} = "{name}"
    {field}

@hookimpl
def kfac_components({arguments}):
    {body}
"""
PARTS: dict[str, list[str]] = {
    "base": ["ApproxConfig", "BlockDiagonalConfig", "BaseModel", "object", "SinkConfig", "ProblemConfig"],
    "kind": ['Literal["{name}"]', "str", 'Literal["a", "b"]', "int", "Any"],
    "name": ["fuzz", "tridiag", "", "a b", "Ü", "x" * 200, "none"],
    "field": ["pass", "x: int", "x: int = 'a'", "x: list = []", "kind2: Any = object()", "x: 'Missing' = 1", "y = 3"],
    "arguments": ["", "", "", "registry", "*a", "a=1"],
    "slot": [f'"{slot}"' for slot in SLOTS] + ['"nothing"', "None", "3", "[]"],
    "target": [
        '"kfac_plugins.approx.blockdiag:BlockDiagonal"', '"no.such:Thing"', '"x"', "None", '""', '"os:path"', "len",
    ],
    "config": ["Config", "Config()", "None", "dict", "BaseModel", "3"],
    "body": [
        "return [Component({slot}, '{name}', {config}, {target}, 'x')]",
        "return [Component({slot}, '{name}', {config}, {target}, 'x')] * 2",
        "yield Component({slot}, '{name}', {config}, {target}, 'x')",
        "return Component({slot}, '{name}', {config}, {target}, 'x')",
        "return [Component({slot}, None, {config}, {target}, None)]",
        "return [3, None]", "return None", "return {}", "raise KeyError('x')", "raise SystemExit(3)", "print('hello')",
        "return iter(lambda: 1 / 0, 1)", "return [type('Component', (), {})()]",
    ],
}  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn) -> str:
    """The source of a plug-in's module."""
    chosen = {part: draw(st.sampled_from(choices)) for part, choices in PARTS.items()}
    text = HEAD
    for part in ("body", "base", "kind", "field", "arguments", "slot", "target", "config", "name"):
        text = text.replace("{" + part + "}", chosen[part])
    return (
        draw(st.sampled_from(["", "", "", "KFAC_API = 'one'\n", "KFAC_API = None\n", "import torch\n", "1 +\n"])) + text
    )


@examples(
    manifests(), st.sampled_from(["fuzzed", "builtin", "", "a b"]), st.sampled_from(["plugins", "list", "doctor"])
)
def test_a_manifest_is_taken_or_named_and_the_rest_works(
    install_plugin: Callable[..., Path], folder: Path, source: str, entry: str, word: str
) -> None:
    number = next(numbers)
    install_plugin(f"fuzzed{number}", source, entry=entry or f"fuzzed{number}")
    try:
        registry = get_registry()
        assert registry.find("approx", "tridiag").target.startswith("kfac_plugins.")
        code, out, err = command(folder, word, "--json")
        assert code in ((0, 1) if word == "doctor" else (0,)), err
        assert json.loads(out)
        assert "Traceback" not in out + err
    finally:
        site = Path(sys.modules[f"fuzzed{number}"].__file__ or "").parent if f"fuzzed{number}" in sys.modules else None
        sys.modules.pop(f"fuzzed{number}", None)
        for path in (site or Path(sys.path[0])).glob(f"fuzzed*{number}*"):
            if path.is_dir():
                for inner in path.iterdir():
                    inner.unlink()
                path.rmdir()
            else:
                path.unlink()
        reset_registry()
