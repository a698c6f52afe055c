"""Eight kinds of broken plug-in, through the command: each is isolated and named, and everything else works."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from patience import PATIENCE
from small_runs import settings, write_data

from kfacore.registry import reset_registry

HEAD = """
from typing import Literal
from pydantic import BaseModel
from kfacore.plugin import ApproxConfig, Component, hookimpl

class Config(ApproxConfig):
    kind: Literal["{component}"] = "{component}"
"""

HOOK = """
@hookimpl
def kfac_components():
    return [Component("approx", "{component}", Config, "kfac_plugins.approx.blockdiag:BlockDiagonal", "x")]
"""

KINDS: dict[str, tuple[str, str]] = {
    "missing_import": ("import surely_not_installed\n" + HEAD + HOOK, "No module named 'surely_not_installed'"),
    "system_exit": ("raise SystemExit('no licence')\n" + HEAD + HOOK, "import failed: SystemExit: no licence"),
    "raising_hook": (HEAD + HOOK.replace("return", "1 / 0; return"), "kfac_components() failed: ZeroDivisionError"),
    "wrong_signature": (HEAD + HOOK.replace("()", "(registry)", 1), "its hooks do not fit"),
    "unknown_hook": (HEAD + HOOK.replace("kfac_components", "kfac_componets"), "kfac_componets"),
    "old_api": ("KFAC_API = 0\n" + HEAD + HOOK, "written for plug-in API 0, this kfacore has 1: upgrade old-api"),
    "name_clash": (HEAD + HOOK, "approx/tridiag: the name is also offered by the plug-in 'builtin'"),
    "wrong_config": (
        HEAD.replace("(ApproxConfig)", "(BaseModel)") + HOOK,
        "Config does not derive from kfacore.plugin.",
    ),
}
"""Source of the plug-in's module, and a part of the reason that is given."""


def component_of(kind: str) -> str:
    return "tridiag" if kind == "name_clash" else kind.replace("_", "-")


def install(site: Path, name: str, source: str) -> Path:
    """A distribution as pip leaves it behind; its name has hyphens, its module underscores."""
    module = site / f"{name}.py"
    module.write_text(textwrap.dedent(source.replace("{component}", component_of(name))), encoding="utf-8")
    info = site / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[kfac]\n{name} = {name}\n")
    return module


def process(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KFAC_DATA": str(cwd)}
    command = [sys.executable, "-c", "from kfac_cli.main import main; main()", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def kfac(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, as if the site were on its path."""
    from kfac_cli.main import main

    out, err, code, before = io.StringIO(), io.StringIO(), 0, set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.syspath_prepend(str(site))
        patch.setenv("KFAC_DATA", str(cwd))
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["kfac", *arguments])
        patch.setattr("kfac_cli.main._drop_output", lambda: None)
        reset_registry()
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            reset_registry()
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(site):
                    del sys.modules[name]
    return subprocess.CompletedProcess(["kfac", *arguments], code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight beside a sound one."""
    folder = tmp_path_factory.mktemp("site")
    for kind, (source, _) in KINDS.items():
        install(folder, kind, source)
    sound = HEAD.replace("from pydantic", "from kfac_plugins.approx import BlockDiagonalConfig\nfrom pydantic")
    install(folder, "sound_one", sound.replace("(ApproxConfig)", "(BlockDiagonalConfig)") + HOOK)
    return folder


def test_all_eight_are_named_side_by_side_and_the_sound_one_is_offered(site: Path, tmp_path: Path) -> None:
    done = process(site, "plugins", "--json", cwd=tmp_path)
    assert done.returncode == 0
    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert set(found) >= {"builtin", "sound_one", *KINDS}
    for kind, (_, reason) in KINDS.items():
        plugin = found[kind]
        assert plugin["state"] == "broken"
        assert (plugin["distribution"], plugin["version"]) == (kind.replace("_", "-"), "1.2")
        assert plugin["file"] == str(site / f"{kind}.py")
        assert reason in plugin["reason"]
        assert plugin["components"] == []
    for name in ("builtin", "sound_one"):
        assert (found[name]["state"], found[name]["reason"]) == ("ok", "")
    assert found["sound_one"]["components"] == ["approx/sound-one"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--help",), "Second-order optimization"),
        (("--version",), "kfac "),
        (("list",), "sound-one"),
        (("list", "approx", "--json"), '"tridiag"'),
        (("show", "approx/tridiag"), "tolerance"),
        (("schema",), "tridiag"),
        (("data", "list"), "mnist"),
        (("new", "plugin", "mine"), "wrote kfac-mine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_other_command_works_beside_all_eight(
    site: Path, tmp_path: Path, arguments: tuple[str, ...], shown: str
) -> None:
    done = kfac(site, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_help_of_every_command_works_beside_all_eight(site: Path, tmp_path: Path) -> None:
    from kfac_cli.main import COMMANDS

    assert len(COMMANDS) >= 9
    for module in COMMANDS:
        name = module.rpartition(".")[2]
        done = kfac(site, name, "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"kfac {name}" in done.stdout


def test_doctor_names_all_eight(site: Path, tmp_path: Path) -> None:
    done = kfac(site, "doctor", cwd=tmp_path)
    assert done.returncode == 1  # that is its answer: something is to be repaired
    for kind, (_, reason) in KINDS.items():
        assert str(site / f"{kind}.py") in done.stdout
        assert reason in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_training_with_the_sound_one_works_beside_all_eight(site: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text("\n".join(settings(tmp_path, "sink=[]")))
    options = ["--approx", "sound-one", "--steps", "2", "--out", "run"]
    done = kfac(site, "train", "-c", "small.toml", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [plugin["name"] for plugin in manifest["plugins"]] == ["builtin", "sound_one"]


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_is_named_when_its_component_is_asked_for(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    source, reason = KINDS[kind]
    module = install(folder, kind, source)
    done = kfac(folder, "show", f"approx/{component_of(kind)}", cwd=tmp_path)
    if kind == "name_clash":  # the name stays with the built-in, and the rival is named all the same
        assert done.returncode == 0
        assert "Inverse block-tridiagonal" in done.stdout
        done = kfac(folder, "plugins", cwd=tmp_path)
        assert reason in done.stdout
        assert str(module) in done.stdout
        return
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"plug-in '{kind}' ({kind.replace('_', '-')} 1.2, {module})" in done.stderr
    assert reason in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["missing_import", "system_exit", "wrong_config"])
def test_it_can_be_switched_off(kind: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_DISABLE_PLUGINS", kind)
    done = kfac(site, "plugins", "--json", cwd=tmp_path)
    (plugin,) = [entry for entry in json.loads(done.stdout) if entry["name"] == kind]
    assert plugin["state"] == "disabled"
