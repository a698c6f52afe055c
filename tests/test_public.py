"""The public surface: what `kfacore` exports, and that the packages say they are typed."""

from __future__ import annotations

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
