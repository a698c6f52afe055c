"""The public surface: what `kfacore` exports, and that the packages say they are typed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import kfacore
import kfacore.errors


def test_every_public_name_loads() -> None:
    assert len(set(kfacore.__all__)) == len(kfacore.__all__) > 8
    for name in kfacore.__all__:
        assert getattr(kfacore, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Kfac'"):
        kfacore.Kfac  # noqa: B018  # the access is what is tested


LAZY = ["kfacore", "kfacore.roles", "kfacore.lab.training", "kfacore.lab.diagnostics"]

SHOW = """
import importlib, sys
packages = [importlib.import_module(name) for name in sys.argv[1:]]
print([p.__name__ for p in packages if not {*p.__all__} <= {*dir(p)}], "torch" in sys.modules)
print([(p.__name__, n) for p in packages for n in p.__all__ if getattr(p, n) is not getattr(p, n)])
"""


def test_every_public_name_is_shown_before_it_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW, *LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] False\n[]\n"


def test_every_error_can_be_caught_by_its_public_name() -> None:
    errors = {name for name in kfacore.errors.__all__ if isinstance(getattr(kfacore.errors, name), type)}
    assert len(errors) >= 7
    assert errors <= set(kfacore.__all__)


@pytest.mark.parametrize("package", ["kfacore", "kfac_plugins", "kfac_cli"])
def test_packages_ship_their_types(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()
