"""The part of the test suite that needs CUDA, in one row: golden replay, crossings of checkpoints, streams, waits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.part import Part

__all__ = ["measure"]

ROOT = Path(__file__).resolve().parents[2]
_SMALL = ["tests/cuda/test_autocast.py"]
_ALL = ["tests/cuda", "tests/optim/test_step_sync.py", "tests/optim/test_targets.py"]


class _Outcomes:
    """A plug-in of pytest that keeps what became of each test as it ends."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep failures by name."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.counts[report.outcome] += 1
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                said = " ".join(str(crash.message if crash else report.longrepr).split())
                self._part.note("tests", f"failed: {report.nodeid}: {said[:300]}")


def measure(part: Part) -> None:
    """Run the tests that are marked `cuda`; without a GPU one file of them, on the CPU."""
    outcomes = _Outcomes(part)
    chosen = ["-m", "cuda", *_ALL] if part.cuda else _SMALL
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *(str(ROOT / each) if "/" in each else each for each in chosen)], plugins=[outcomes])
    counts = outcomes.counts
    part.row(
        "tests",
        device=part.device.type,
        passed=counts["passed"],
        failed=counts["failed"],
        skipped=counts["skipped"],
        **{"exit code": int(code)},
    )
