"""The example distribution with a layer type as a third party's: installed into a fresh environment, found, tested."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from patience import PATIENCE

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "kfac-lowrank"
VERSION = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_it_is_listed_and_its_manifest_needs_no_torch_and_every_network_asks_it(site: Path) -> None:
    """As the distribution's, in one process of its own."""
    code = (
        "import sys\n"
        "from kfacore.registry import get_registry\n"
        "registry = get_registry()\n"
        "plugin = registry.origin(registry.find('layer', 'lowrank'))\n"
        "assert (plugin.name, plugin.distribution) == ('lowrank', 'kfac-lowrank'), plugin\n"
        "assert registry.components('layer')[-1].name == 'lowrank'\n"
        "assert 'torch' not in sys.modules\n"
        "from kfac_lowrank.module import LowRank\n"
        "print(*[layer.config.kind for layer in get_registry().layers() if layer.matches(LowRank(3, 2, 1))])"
    )
    done = run(site, "-c", code)
    assert done.stdout.strip() == "lowrank", done.stderr


def test_its_own_tests_pass(site: Path) -> None:
    done = run(site, "-m", "pytest", "-p", "no:cacheprovider", cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert f"kfac_lowrank-{VERSION}.dist-info" in {path.name for path in site.iterdir()}
