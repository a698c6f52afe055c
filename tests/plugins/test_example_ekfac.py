"""The example distribution as a third party's: installed into a fresh environment, found, trained with, recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE
from small_runs import settings, write_data

from kfacore.registry import reset_registry

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "kfac-ekfac"
VERSION = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built and installed by pip from its own pyproject.toml; no network, nothing added to this environment."""
    site = tmp_path_factory.mktemp("environment")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, *pip, "--no-index", "--target", str(site), str(EXAMPLE)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return site


def run(site: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the distribution on its path, beside this one's packages."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.fixture
def command(fresh: Path, kfac, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The command in this process with the distribution installed; its stdout."""
    monkeypatch.syspath_prepend(str(fresh))
    before = set(sys.modules)
    reset_registry()

    def call(*arguments: object) -> str:
        code, out, err = kfac(*arguments)
        assert code == 0, err
        return out

    yield call
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "kfac_ekfac":
            del sys.modules[name]
    monkeypatch.undo()
    reset_registry()


def test_it_is_not_part_of_kfacore() -> None:
    done = subprocess.run([sys.executable, "-c", "import kfac_ekfac"], capture_output=True, text=True, check=False)
    assert "No module named 'kfac_ekfac'" in done.stderr


def test_it_is_listed_with_its_distribution(command) -> None:
    listed = json.loads(command("list", "approx", "--json"))
    assert {"name": "ekfac", "plugin": "ekfac", "distribution": "kfac-ekfac"}.items() <= listed[-1].items()
    assert f"[kfac-ekfac {VERSION}]" in command("list")
    (plugin,) = [p for p in json.loads(command("plugins", "--json")) if p["name"] == "ekfac"]
    assert (plugin["state"], plugin["version"], plugin["components"]) == ("ok", VERSION, ["approx/ekfac"])
    assert "basis_every" in command("show", "approx/ekfac")


def test_its_manifest_keeps_the_commands_free_of_torch(fresh: Path) -> None:
    code = (
        "import sys\n"
        "from kfacore.registry import get_registry\n"
        "assert get_registry().find('approx', 'ekfac')\n"
        "print('torch' in sys.modules)"
    )
    assert run(fresh, "-c", code).stdout.strip() == "False"


def test_a_run_with_it_records_its_version(command, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text("\n".join(settings(tmp_path, "sink=[]")))
    options = ["--approx", "ekfac", "--set", "approx.basis_every=4"]
    out = command("train", "-c", "small.toml", *options, "--out", "run", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["approx"] == "ekfac"
    evals = [event["train_loss"] for event in events if event["event"] == "eval"]
    assert evals[-1] < evals[0]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"name": "ekfac", "distribution": "kfac-ekfac", "version": VERSION} in manifest["plugins"]


def test_its_own_tests_pass(fresh: Path) -> None:
    done = run(fresh, "-m", "pytest", "-p", "no:cacheprovider", cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
