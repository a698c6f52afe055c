"""README and docs say what is true: links resolve, code runs, command lines parse, keys and events exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configuration_keys
import numpy as np
import pytest
import typer.main
from patience import PATIENCE
from small_runs import KEYS, run

import kfacore.errors
from kfac_cli.main import app
from kfacore.lab.config.resolve import resolve
from kfacore.registry import get_registry, reset_registry
from kfacore.schema.presets import PRESETS

ROOT = Path(__file__).parent.parent
NOTES = sorted((ROOT / "docs" / "notes").glob("2*.md"))
"""What was measured once, and is not edited when the code goes on: only its links must hold."""

DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
DOCS += [path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in NOTES]
EXAMPLE = [ROOT / "docs" / "tutorials" / "your-plugin.md", ROOT / "docs" / "howto" / "components.md"]

NOT_RUN = re.compile(r"<!-- not run: .+ -->")
"""On the line before a Python block: why it is not run here."""

FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))")
"""First line of a block that is a file, not a script."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: What stands behind the opening fence.
        line: Number of its first line in the document, from 1.
        text: What is in it.
        skipped: Whether it is marked as not to be run.
    """

    language: str
    line: int
    text: str
    skipped: bool

    @property
    def file(self) -> str | None:
        """The file that the block is, if it is one."""
        found = FILE.fullmatch(self.text.partition("\n")[0])
        return found[1] if found else None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    blocks: list[Block] = []
    language: str | None = None
    start, before = 0, ""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if language is None and line.startswith("```"):
            language, start = line[3:].strip(), number + 1
            before = lines[number - 2] if number > 1 else ""
        elif language is not None and line.startswith("```"):
            body = "".join(f"{inner}\n" for inner in lines[start - 1 : number - 1])
            blocks.append(Block(language, start, body, bool(NOT_RUN.fullmatch(before))))
            language = None
    assert language is None, f"the block that starts at line {start} has no end"
    return blocks


def prose_of(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links and pictures ----------------------------------------------------------------------------------------------


def broken_links(document: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists():
            found.append(f"{target}: there is no such file")
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", prose_of(file.read_text(encoding="utf-8")), flags=re.MULTILINE)
            if anchor not in {slug(heading) for heading in headings}:
                found.append(f"{target}: there is no such heading")
    return found


@pytest.mark.parametrize("document", [*DOCS, *NOTES], ids=name_of)
def test_links_resolve(document: Path) -> None:
    assert broken_links(document, document.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_found() -> None:
    text = "[a](no/such.md) [b](docs/explanation/method.md#no-such) [c](docs/explanation/method.md#notation) [d](https://example.org/)"
    assert [entry.partition(":")[0] for entry in broken_links(ROOT / "README.md", text)] == [
        "no/such.md",
        "docs/explanation/method.md#no-such",
    ]


@pytest.mark.parametrize("document", DOCS, ids=name_of)
def test_paths_in_the_text_exist(document: Path) -> None:
    paths = re.findall(r"`((?:kfacore|plugins|cli|tests|docs|benchmarks)/[\w./-]*)`", prose_of(document.read_text()))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_pictures_are_small_and_shown() -> None:
    pictures = sorted((ROOT / "docs" / "images").glob("*"))
    assert pictures
    text = "".join(path.read_text(encoding="utf-8") for path in (*DOCS, *NOTES))
    for picture in pictures:
        assert picture.stat().st_size < 300_000, f"{picture.name} is too large for a repository"
        assert f"images/{picture.name})" in text, f"{picture.name} is not shown anywhere"


def test_the_two_commands_are_in_the_readme_and_the_makefile() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("train", "test"):
        assert f"\nmake {target}\n" in readme
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


# --- the example plug-in ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in of the docs, written out file by file, built and installed: `source` and `site`."""
    folder = tmp_path_factory.mktemp("example")
    for block in (block for page in EXAMPLE for block in blocks_of(page.read_text(encoding="utf-8"))):
        if block.file is not None:
            path = folder / "source" / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=folder / "source",
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder


@pytest.fixture
def installed(example: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plug-in installed in this process."""
    monkeypatch.syspath_prepend(str(example / "site"))
    reset_registry()
    yield example
    for name in [name for name in sys.modules if name.partition(".")[0] == "kfac_kron_diagonal"]:
        del sys.modules[name]
    reset_registry()


@pytest.mark.usefixtures("installed")
def test_the_example_plugin_is_found(kfac: Callable[..., tuple[int, str, str]]) -> None:
    assert "kron-diagonal" in kfac("list", "approx")[1]
    plugins = {item["name"]: item for item in json.loads(kfac("plugins", "--json")[1])}
    assert plugins["kron-diagonal"]["state"] == "ok", plugins["kron-diagonal"]["reason"]


@pytest.mark.usefixtures("installed", "no_pictures")
def test_the_example_plugin_trains(kfac: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x_train=rng.random((200, 6), dtype=np.float32))
    options = ["problem.kind=npz", "problem.file=data.npz", "problem.sizes=[4]", "batch.start=100"]
    sets = [word for option in options for word in ("--set", option)]
    code, out, err = kfac("train", *sets, "--approx", "kron-diagonal", "--steps", "4", "--json")
    assert code == 0, err
    lines = out.splitlines()
    start, done = json.loads(lines[0]), json.loads(lines[-1])
    assert (start["approx"], done["event"], done["step"]) == ("kron-diagonal", "done", 4)


def test_the_example_plugin_passes_its_suite(example: Path) -> None:
    """In a process of its own, which finds the plug-in as it is installed."""
    environ = {**os.environ, "PYTHONPATH": str(example / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests"]
    done = subprocess.run(
        command, cwd=example / "source", env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d+ passed", done.stdout), done.stdout


# --- Python ----------------------------------------------------------------------------------------------------------


def script_of(document: Path) -> str:
    """The Python blocks of a document as one script whose lines have the numbers they have there."""
    lines: list[str] = []
    for block in blocks_of(document.read_text(encoding="utf-8")):
        if block.language == "python" and block.file is None and not block.skipped:
            lines += [""] * (block.line - 1 - len(lines)) + block.text.rstrip("\n").split("\n")
    return "\n".join(lines) + "\n"


WITH_PYTHON = [document for document in DOCS if script_of(document).strip()]


@pytest.mark.parametrize("document", WITH_PYTHON, ids=name_of)
@pytest.mark.usefixtures("installed")
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"{document.stem}.py"
    script.write_text(script_of(document), encoding="utf-8")
    runpy.run_path(str(script), run_name=f"docs_{document.stem}")


def test_python_is_found_where_it_is_expected() -> None:
    assert {"README.md", "docs/tutorials/your-model.md", "docs/tutorials/your-plugin.md"} <= set(
        map(name_of, WITH_PYTHON)
    )


def test_few_blocks_are_not_run() -> None:
    skipped = [block for document in DOCS for block in blocks_of(document.read_text("utf-8")) if block.skipped]
    assert len(skipped) <= 3


# --- command lines ---------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[tuple[list[str], bool]]:
    """The words of every line that calls kfac: whole ones in console and bash blocks, mentions in the text."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks_of(text)
        if block.language in ("bash", "console")
        for line in block.text.splitlines()
    ]
    mentions = re.findall(r"`(kfac [a-z][^`]*)`", " ".join(prose_of(text).split()))
    words = [(shlex.split(line, comments=True), line in mentions) for line in (*lines, *mentions)]
    return [(line[1:], mention) for line, mention in words if line and line[0] == "kfac"]


COMMAND = typer.main.get_command(app)


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that a line names, and its parameters; raises click's usage errors."""
    command: Any = COMMAND
    context = command.make_context("kfac", words)
    path = []
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return " ".join(path), dict(context.params)


COMMANDS = [
    pytest.param(words, mention, id=f"{name_of(document)}: {' '.join(words)}")
    for document in DOCS
    for words, mention in commands_of(document.read_text(encoding="utf-8"))
    if not {"--help", "--version", "--install-completion"} & set(words)
]


FILES = {
    block.file: block.text
    for document in DOCS
    for block in blocks_of(document.read_text(encoding="utf-8"))
    if block.language in ("toml", "python") and block.file is not None and "/" not in block.file
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the docs, TOML and Python, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("words", "mention"), COMMANDS)
@pytest.mark.usefixtures("files", "installed")
def test_command_lines_parse_and_mean_something(words: list[str], mention: bool) -> None:
    try:
        command, given = parse(words)
    except Exception as error:
        if mention and type(error).__name__ == "MissingParameter":  # `kfac report` as the name of a command
            return
        raise
    registry = get_registry()
    if command == "train" and given["resume"] is None:
        flags = {name: given[name] for name in ("problem", "approx", "optimizer", "steps", "seed", "dtype")}
        flags["problem"] = given["what"] or flags["problem"]
        resolve(registry, preset=given["preset"], files=given["config"] or (), flags=flags, sets=given["sets"] or ())
    elif command == "show" and given["what"] != "SLOT/NAME":
        slot, _, name = given["what"].partition("/")
        assert registry.find(slot, name).name == name
    elif command == "list":
        assert given["slot"] is None or registry.components(given["slot"])
    elif command == "data fetch":
        assert hasattr(registry.find("problem", given["problem"]).config, "fetch_data")


def test_command_lines_are_found() -> None:
    assert len(COMMANDS) > 30
    with pytest.raises(Exception, match="No such option"):
        parse(["train", "--stepz", "3"])
    with pytest.raises(Exception, match="No such command"):
        parse(["trian"])


@pytest.mark.parametrize("command", ["train", "report"])
def test_the_flags_are_documented_and_exist(command: str) -> None:
    text = (ROOT / "docs" / "howto" / "command.md").read_text(encoding="utf-8")
    section = text[text.index(f"## kfac {command}\n") :].partition("\n## ")[0]
    documented = {flag for row in re.findall(r"^\| (`-.*?) \|", section, re.MULTILINE) for flag in _flags(row)}
    group: Any = COMMAND
    options = {
        flag
        for parameter in group.commands[command].params
        for flag in parameter.opts
        if flag.startswith("-") and flag != "--help"
    }
    assert documented == options


def _flags(cell: str) -> list[str]:
    return re.findall(r"`(--?[a-z][a-z-]*)", cell)


# --- keys, presets, events, errors -----------------------------------------------------------------------------------


def rows_of(document: str, *, under: str) -> list[list[str]]:
    """The cells of every table row of a section that starts with a name in backticks."""
    section = _section((ROOT / "docs" / document).read_text(encoding="utf-8"), under)
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def _section(text: str, heading: str) -> str:
    level = heading.partition(" ")[0]
    rest = text[text.index(f"\n{heading}\n") + len(heading) + 2 :]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_the_keys_are_documented_and_exist() -> None:
    """Every key of a run and of a component with its type, default and meaning, and no other."""
    for document in configuration_keys.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert configuration_keys.written(text) == text, "run: python tests/configuration_keys.py"


def test_a_key_too_many_or_too_few_would_be_found() -> None:
    run, components = (document.read_text(encoding="utf-8") for document in configuration_keys.DOCUMENTS[:2])
    for key in ("budget.cases", "steps"):
        assert f"\n| `{key}` |" in run
    for key in ("approx.max_parameters", "executor.workers", "damping.gamma_max"):
        assert f"\n| `{key}` |" in components
    rows = [row for row in run.split("\n") if "| `steps` |" not in row]
    assert configuration_keys.written("\n".join(rows)) == run
    more = run.replace("| `steps` |", "| `stepps` | int | 3 | none |\n| `steps` |")
    assert configuration_keys.written(more) == run


def test_presets_are_documented() -> None:
    assert {row[0].strip("`") for row in rows_of("howto/configuration.md", under="## Presets")} == set(PRESETS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    folder: Path = run(tmp_path_factory.mktemp("finished"), "run", "pictures=true").run
    return folder


def test_events_have_the_documented_keys(finished: Path) -> None:
    rows = rows_of("howto/command.md", under="### Events")
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows}
    evaluation = {f"{prefix}{key}" for prefix in ("", "averaged_") for key in KEYS}
    documented["step"] -= {"notices", "increased", "rejected"}  # only where there are any
    documented["eval"] = (documented["eval"] - {"averaged_"}) | evaluation
    documented["done"] = (documented["done"] - {"eval"}) | evaluation
    lines = (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, set[str]] = {}
    for event in map(json.loads, lines):
        found.setdefault(event["event"], set(event) - {"event", "step", "seconds", "notices"})
    documented["done"] -= {"notices", "advice"}
    assert documented.pop("diverged") == {"reason"}  # in place of "done"; `test_training_outcome` has one
    assert found == documented


def test_the_run_folder_has_the_documented_files(finished: Path) -> None:
    documented = {row[0].strip("`").rstrip("/") for row in rows_of("howto/command.md", under="### The run folder")}
    assert {path.name for path in finished.iterdir()} == documented


def test_errors_have_the_documented_exit_codes() -> None:
    rows = rows_of("explanation/architecture.md", under="## Errors")
    errors = {name: value for name, value in vars(kfacore.errors).items() if isinstance(value, type)}
    known = {name: error.exit_code for name, error in errors.items() if name != "KfacError"}
    assert {row[0].strip("`"): int(row[1]) for row in rows} == known
