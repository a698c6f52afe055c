"""Training runs: the loop, the run folder, checkpoints, evaluation, pictures and comparisons.

Importing this package imports no torch; the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfacore.lab.training.loop import train
    from kfacore.lab.training.report import RunSummary, compare
    from kfacore.lab.training.results import RunResult
    from kfacore.lab.training.resume import resume_config
    from kfacore.lab.training.run import RunFolder
    from kfacore.lab.training.signals import Interrupted

__all__ = ["Interrupted", "RunFolder", "RunResult", "RunSummary", "compare", "resume_config", "train"]

_HOMES = {
    "Interrupted": "signals",
    "RunFolder": "run",
    "RunResult": "results",
    "RunSummary": "report",
    "compare": "report",
    "resume_config": "resume",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfacore.lab.training' has no attribute {name!r}")
    return getattr(import_module(f"kfacore.lab.training.{_HOMES[name]}"), name)
