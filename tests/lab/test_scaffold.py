"""A generated plug-in is a whole distribution: it installs, is found, passes the suite and trains, as it is."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fuzzing import ALL
from patience import PATIENCE

import kfacore
from kfacore.errors import ConfigError
from kfacore.lab.scaffold import NewPlugin, write_plugin
from kfacore.lab.scaffold import plugin as scaffold
from kfacore.lab.scaffold.kinds import KINDS
from kfacore.plugin import SLOTS
from kfacore.registry import get_registry

FILES = (
    "README.md",
    "kfac_two_words/__init__.py",
    "kfac_two_words/approximation.py",
    "kfac_two_words/py.typed",
    "pyproject.toml",
    "tests/test_kfac_two_words.py",
)


def lay(made: NewPlugin, site: Path) -> None:
    """Copy a distribution that has been written where it is found."""
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    shutil.copytree(made.folder / made.module, site / made.module)
    info = site / f"{made.module}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    points = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["kfac"].items())
    (info / "entry_points.txt").write_text(f"[kfac]\n{points}", encoding="utf-8")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, str]]]:
    """One of each kind, made-SLOT, the first installed by pip: their tests' report, their output, the list."""
    folder = tmp_path_factory.mktemp("made")
    made = [write_plugin(f"made-{slot}", folder, get_registry(), slot) for slot in KINDS]
    site, report = folder / "site", folder / "report.xml"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, cwd: Path = folder) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    run(*pip, "--no-index", "--target", str(site), str(made[0].folder))
    for each in made[1:]:  # as pip would, and without its seconds
        lay(each, site)
    # All in one process, with the settings of the first, which are those of all.
    settings = ["-c", str(made[0].folder / "pyproject.toml"), "--rootdir", str(folder), f"--junitxml={report}"]
    tests = [str(each.folder / "tests") for each in made]
    if not os.environ.get(ALL):  # each of these starts processes that import torch, as those of the executors here do
        tests += ["-k", "not (TestMadeExecutor and (ended or stop or killed or close_ends))"]
    tested = run("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *settings, *tests)
    listed = json.loads(run("-c", "from kfac_cli.main import main; main()", "list", "--json"))
    return report, tested, listed


@pytest.mark.parametrize("slot", KINDS)
def test_it_is_found_and_passes_its_suite_as_generated(installed, slot: str) -> None:
    report, tested, listed = installed
    cases = [case for case in ElementTree.parse(report).iter("testcase") if f"made_{slot}" in case.get("classname")]
    assert len(cases) >= 3, tested
    assert not [case.get("name") for case in cases if len(case)]  # neither failed nor skipped
    (found,) = [entry for entry in listed if entry["name"] == f"made-{slot}"]
    assert (found["slot"], found["plugin"]) == (slot, f"made-{slot}")
    assert found["distribution"] == f"kfac-made-{slot}"


def test_every_slot_has_a_template() -> None:
    assert list(KINDS.keys() ^ SLOTS.keys()) == []


def test_what_is_written(tmp_path: Path) -> None:
    made = write_plugin("kfac-two-words", tmp_path, get_registry())  # the prefix is not doubled
    assert (made.name, made.distribution, made.module) == ("two-words", "kfac-two-words", "kfac_two_words")
    assert tuple(sorted(made.files)) == FILES
    found = sorted(p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file())
    assert tuple(found) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kfac-two-words"]  # nothing else is left
    for file in made.files:
        text = (made.folder / file).read_text()
        assert "@" not in text.replace("@hookimpl", ""), file
        assert max(map(len, text.splitlines()), default=0) <= 120, file
        if file.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"kfacore>={kfacore.__version__}"]
    assert project["entry-points"] == {"kfac": {"two-words": "kfac_two_words"}}


@pytest.mark.parametrize("name", ["x", "a1-b2", "tensor", "inverse", "any", "approximation", "e" * 40])
def test_no_name_collides_with_a_name_in_the_code(tmp_path: Path, name: str) -> None:
    made = write_plugin(name, tmp_path, get_registry())
    for file in made.files:
        if not file.endswith(".py"):
            continue
        tree = ast.parse((made.folder / file).read_text())
        imported = [
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        ]
        defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        assert len(set(imported + defined)) == len(imported + defined), file


def test_generated_code_is_as_clean_as_ours(tmp_path: Path) -> None:
    for slot in KINDS:
        (tmp_path / slot).mkdir()
        made = write_plugin("two-words", tmp_path / slot, get_registry(), slot)
        for file in made.files:
            text = (made.folder / file).read_text()
            assert not re.search(r"@(?!hookimpl|property|classmethod)", text), file
            assert max(map(len, text.splitlines()), default=0) <= 120, file
    for command in (["check", "--select", "B,C4,E,F,I,PT,RUF,SIM,UP,W", "--ignore", "RUF002"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My_Approx", "'My_Approx' cannot be used: .* starts with a letter, for example 'my-approx'"),
        ("3d", "the name '3d' cannot be used"),
        ("kfac-", "the name '' cannot be used"),
        ("two--words", "for example 'two-words'"),
        ("../evil", "for example 'evil'"),
        ("naïve", "the name 'naïve' cannot be used"),
        ("x" * 41, "has 41 characters; use at most 40"),
        ("damping", "is that of a slot"),
        ("tridiag", r"approx 'tridiag' exists already \(plug-in 'builtin' \(kfacore "),
        ("builtin", "a plug-in named 'builtin' is installed already"),
        ("plugins", "a package named 'kfac_plugins' is installed already"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_plugin(name, tmp_path, get_registry())
    assert list(tmp_path.iterdir()) == []


def test_slots_without_a_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--slot dampng: there is no template for it; did you mean 'damping'\?"):
        write_plugin("mine", tmp_path, get_registry(), "dampng")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "kfac-mine"
    folder.mkdir()
    (folder / "notes").write_text("precious")
    with pytest.raises(ConfigError, match="kfac-mine exists already, and nothing is ever written over"):
        write_plugin("mine", tmp_path, get_registry())
    assert [p.name for p in folder.iterdir()] == ["notes"]
    for into, what in ((tmp_path / "none", "does not exist"), (folder / "notes", "is not a folder")):
        with pytest.raises(ConfigError, match=f"{what}; name the folder in which kfac-mine shall be made"):
            write_plugin("mine", into, get_registry())


def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = Path.write_text

    def full(self: Path, *arguments: str, **options: str) -> int:
        written.append(self.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(scaffold.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_plugin("mine", tmp_path, get_registry())
    assert list(tmp_path.iterdir()) == []


def test_the_command(kfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = kfac("new", "plugin", "mine")
    assert code == 0
    assert out.startswith("wrote kfac-mine\n  pyproject.toml\n")
    assert "pip install --no-build-isolation -e kfac-mine" in out
    code, out, err = kfac("new", "plugin", "mine")
    assert (code, out) == (2, "")
    assert err.startswith("error: kfac-mine exists already")
    assert len(err.splitlines()) == 1
    (tmp_path / "other").mkdir()
    code, out, _ = kfac("new", "plugin", "mine", "--into", "other", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["folder"] == os.path.join("other", "kfac-mine")
    assert set(answer) == {"name", "slot", "distribution", "module", "folder", "files"}
    assert (tmp_path / "other" / "kfac-mine" / "README.md").is_file()


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from kfac_cli.main import main; sys.argv = ['kfac', 'new', 'plugin', 'mine']\n"
        "try: main()\nexcept SystemExit as left: assert not left.code\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
