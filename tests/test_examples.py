"""The programs in examples/ run, on little data, and are one page each."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_some() -> None:
    names = {"plain_loop", "images", "char_gpt", "hf_trainer", "lightning_trainer", "accelerated"}
    assert names <= {path.stem for path in PROGRAMS}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore::UserWarning:lightning")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs_and_is_one_page(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 60
    alone, guest = load(path).main(20)
    assert math.isfinite(alone)
    assert math.isfinite(guest)
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text("utf-8")


def test_curvature_helps_in_the_plain_loop() -> None:
    alone, guest = load(ROOT / "examples" / "plain_loop.py").main(60)
    assert guest < alone
