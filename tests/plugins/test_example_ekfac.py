"""The example distribution as a third party's: installed into a fresh environment, found, trained with, recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from small_runs import settings, write_data

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "kfac-ekfac"
VERSION = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["version"]


class Environment:
    """A folder on the path with the distribution in it, beside this interpreter's packages."""

    def __init__(self, site: Path) -> None:
        self.variables = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=self.variables, capture_output=True, text=True, timeout=240, check=False
        )

    def kfac(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        done = self.run("-c", "from kfac_cli.main import main; main()", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Built and installed by pip from its own pyproject.toml; no network, nothing added to this environment."""
    site = tmp_path_factory.mktemp("environment")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, *pip, "--no-index", "--target", str(site), str(EXAMPLE)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Environment(site)


def test_it_is_not_part_of_kfacore() -> None:
    done = subprocess.run([sys.executable, "-c", "import kfac_ekfac"], capture_output=True, text=True, check=False)
    assert "No module named 'kfac_ekfac'" in done.stderr


def test_it_is_listed_with_its_distribution(fresh: Environment) -> None:
    listed = json.loads(fresh.kfac("list", "approx", "--json"))
    assert {"name": "ekfac", "plugin": "ekfac", "distribution": "kfac-ekfac"}.items() <= listed[-1].items()
    assert f"[kfac-ekfac {VERSION}]" in fresh.kfac("list")
    (plugin,) = [p for p in json.loads(fresh.kfac("plugins", "--json")) if p["name"] == "ekfac"]
    assert (plugin["state"], plugin["version"], plugin["components"]) == ("ok", VERSION, ["approx/ekfac"])
    assert "basis_every" in fresh.kfac("show", "approx/ekfac")


def test_its_manifest_keeps_the_commands_free_of_torch(fresh: Environment) -> None:
    code = (
        "import sys\n"
        "from kfacore.registry import get_registry\n"
        "assert get_registry().find('approx', 'ekfac')\n"
        "print('torch' in sys.modules)"
    )
    assert fresh.run("-c", code).stdout.strip() == "False"


def test_a_run_with_it_records_its_version(fresh: Environment, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text("\n".join(settings(tmp_path, "sink=[]")))  # no event file, so no pictures
    options = ["--approx", "ekfac", "--set", "approx.basis_every=4"]
    out = fresh.kfac("train", "-c", "small.toml", *options, "--out", "run", "--json", cwd=tmp_path)
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["approx"] == "ekfac"
    evals = [event["train_loss"] for event in events if event["event"] == "eval"]
    assert evals[-1] < evals[0]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"name": "ekfac", "distribution": "kfac-ekfac", "version": VERSION} in manifest["plugins"]


def test_its_own_tests_pass(fresh: Environment) -> None:
    done = fresh.run("-m", "pytest", "-p", "no:cacheprovider", cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
