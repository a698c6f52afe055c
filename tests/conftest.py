"""Shared fixtures: distributions with plug-ins, installed for one test in a folder on the path."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kfacore.registry import reset_registry

# Before torch is loaded, here and in the commands that tests start: on nets this small a second thread only waits, and
# beside other work on the machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test wants several threads, those without work sleep, in place of turning on a core that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

Install = Callable[..., Path]

ALL = "KFAC_TEST_ALL"
"""Environment variable for `fuzzing` and for the processes of pytest-xdist: tests marked slow too, 1,000 examples."""


LONG = [
    "parallel/test_ranks",
    "lab/test_study_executors",
    "fuzz/test_fuzz_command",
    "fuzz/test_fuzz_files",
    "plugins/test_layers_conformance",
    "plugins/test_conformance",
    "lab/test_scaffold",
    "lab/test_study_kill",
    "lab/test_study_processes",
    "lab/test_training_processes",
    "lab/test_study_runner",
    "plugins/test_example_ekfac",
    "plugins/test_example_lowrank",
    "optim/test_architectures",
    "test_benchmarks",
    "test_benchmarks_gpu",
    "test_robust",
    "test_examples",
    "test_docs",
]
"""Files that come first: of several processes, one would be left alone with the last of them in the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="slow tests too, and 1,000 examples of each fuzz test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ[ALL] = "1"


def _mark_cuda(items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU: tests with the device among their parameters."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and "cuda" in [value for value in call.params.values() if isinstance(value, str)]:
            item.add_marker("cuda")


def _lighten(torch: Any) -> None:
    """Without what costs milliseconds in each of thousands of tests: those of layers take a fifth less time."""
    typer.main.get_command = cache(typer.main.get_command)  # made anew from their functions in every call of `kfac`
    os.fsync = lambda file: None  # waits for the disk, in case the power fails: processes that are killed need no disk
    if not torch.accelerator.is_available():
        # `torch.manual_seed` keeps the seed and the stack of its caller for every kind of device that is not there.
        torch.manual_seed = torch.default_generator.manual_seed
    for logger in list(logging.root.manager.loggerDict.values()):
        # pytest listens six times a test at each logger that does not propagate, and torch has fifty.
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "torch" in sys.modules:
        _lighten(sys.modules["torch"])
    _mark_cuda(items)
    if len(items) > 1000:  # not where a few files are named in the order that is wanted
        order = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.path, len(order)))
    if os.environ.get(ALL) or any("::" in argument for argument in config.args):  # named tests are wanted
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install_plugin(name, source, ...)`` installs a distribution whose module of that name is a plug-in."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def install(
        name: str, source: str, *, distribution: str | None = None, entry: str | None = None, version: str = "1.2"
    ) -> Path:
        distribution = distribution or name.replace("_", "-")
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test's, from elsewhere
        module = site / f"{name}.py"
        module.write_text(textwrap.dedent(source), encoding="utf-8")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[kfac]\n{entry or name} = {name}\n", encoding="utf-8")
        reset_registry()
        return module

    yield install
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(site):
            del sys.modules[name]
    reset_registry()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that stand as they are draw nothing at their end, which takes most of the time of a small run.

    `test_training_plots`, `test_cli_train` and the executors' tests look at what is drawn; others say `pictures=false`.
    """
    monkeypatch.setattr("kfacore.lab.training.loop.draw_run", lambda *_: ())


@pytest.fixture
def kfac(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, in a fresh folder: ``(exit code, stdout, stderr)``."""
    from kfac_cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kfac", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call
