"""Training runs: the loop, the run folder, checkpoints, evaluation, pictures and comparisons.

Importing this package imports no torch; the names below are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.lazy import lazy_names

if TYPE_CHECKING:
    from kfacore.lab.training.loop import train
    from kfacore.lab.training.report import RunSummary, compare
    from kfacore.lab.training.results import RunResult
    from kfacore.lab.training.resume import resume_config
    from kfacore.lab.training.run import RunFolder
    from kfacore.lab.training.signals import Interrupted

__all__ = ["Interrupted", "RunFolder", "RunResult", "RunSummary", "compare", "resume_config", "train"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "loop": ("train",),
        "report": (
            "RunSummary",
            "compare",
        ),
        "results": ("RunResult",),
        "resume": ("resume_config",),
        "run": ("RunFolder",),
        "signals": ("Interrupted",),
    },
)
