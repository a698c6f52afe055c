"""Imports point one way: kfac_cli -> kfacore <- kfac_plugins. Read from the source, so that no lazy import hides."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE

FORBIDDEN = {
    "kfacore": {"kfac_plugins", "kfac_cli"},
    "kfac_plugins": {"kfac_cli"},
    "kfac_cli": {"kfac_plugins"},
}


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import, those by name through ``import_module`` and ``__import__`` too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.partition(".")[0]


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    files = sorted(folder_of(package).rglob("*.py"))
    assert len(files) > 5
    wrong = [
        f"{file.name}:{line} imports {name}"
        for file in files
        for line, name in imported(file)
        if name in FORBIDDEN[package]
    ]
    assert wrong == []


def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n    import_module('i.j')\n"
        "    importlib.import_module('k')\n    __import__('l')\n",
        encoding="utf-8",
    )
    assert [name for _, name in sorted(imported(file))] == ["a", "c", "h", "i", "k", "l"]


def test_the_install_has_no_packages_called_plugins_or_cli() -> None:
    # Isolated, so that the working folder does not lend its folders as namespaces.
    names = ["kfacore", "kfac_cli", "kfac_plugins", "plugins", "cli"]
    script = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout.strip() == "['kfacore', 'kfac_cli', 'kfac_plugins']"
