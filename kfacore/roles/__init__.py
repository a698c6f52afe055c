"""The abstract roles that components play, loaded on first use: most of them need torch, executors and sinks do not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfacore.roles.approx import Approximation, Factorisation, Inverse, Notice
    from kfacore.roles.base import Part
    from kfacore.roles.damping import Damping
    from kfacore.roles.estimator import Estimator, LayerSamples
    from kfacore.roles.executor import Ended, Executor
    from kfacore.roles.likelihood import Likelihood
    from kfacore.roles.momentum import Momentum
    from kfacore.roles.optimizer import Optimizer, StepReport
    from kfacore.roles.problem import Problem, ProblemData, Split
    from kfacore.roles.sink import Sink

__all__ = [
    "Approximation",
    "Damping",
    "Ended",
    "Estimator",
    "Executor",
    "Factorisation",
    "Inverse",
    "LayerSamples",
    "Likelihood",
    "Momentum",
    "Notice",
    "Optimizer",
    "Part",
    "Problem",
    "ProblemData",
    "Sink",
    "Split",
    "StepReport",
]

_HOMES = {
    "Approximation": "approx",
    "Damping": "damping",
    "Ended": "executor",
    "Estimator": "estimator",
    "Executor": "executor",
    "Factorisation": "approx",
    "Inverse": "approx",
    "LayerSamples": "estimator",
    "Likelihood": "likelihood",
    "Momentum": "momentum",
    "Notice": "approx",
    "Optimizer": "optimizer",
    "Part": "base",
    "Problem": "problem",
    "ProblemData": "problem",
    "Sink": "sink",
    "Split": "problem",
    "StepReport": "optimizer",
}


def __getattr__(name: str) -> Any:
    """Load a role on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfacore.roles' has no attribute {name!r}")
    return getattr(import_module(f"kfacore.roles.{_HOMES[name]}"), name)
