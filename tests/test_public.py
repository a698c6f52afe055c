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


@pytest.mark.parametrize("package", ["kfacore", "kfacore.roles", "kfacore.lab.training", "kfacore.lab.diagnostics"])
def test_every_public_name_is_shown_before_it_is_loaded(package: str) -> None:
    script = (
        f"import sys, {package} as p; assert {{*p.__all__}} <= {{*dir(p)}}; print('torch' in sys.modules)\n"
        "assert all(getattr(p, name) is getattr(p, name) for name in p.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
    assert done.returncode == 0, done.stderr


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
