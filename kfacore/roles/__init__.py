"""The abstract roles that components play, loaded on first use: most of them need torch, executors and sinks do not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfacore.roles.approx import Approximation, Factorisation
    from kfacore.roles.base import Part
    from kfacore.roles.block import Block, Side
    from kfacore.roles.damping import Damping
    from kfacore.roles.estimator import Estimator
    from kfacore.roles.executor import Ended, Executor
    from kfacore.roles.inverse import Inverse, Notice
    from kfacore.roles.layer import Emit, Layer, Use
    from kfacore.roles.likelihood import Likelihood, Terms
    from kfacore.roles.moment import Moment, Moments
    from kfacore.roles.momentum import Momentum
    from kfacore.roles.optimizer import Optimizer, StepReport
    from kfacore.roles.problem import Problem, ProblemData, Split
    from kfacore.roles.samples import LayerSamples
    from kfacore.roles.sink import Sink
    from kfacore.roles.trust import Trust

__all__ = [
    "Approximation",
    "Block",
    "Damping",
    "Emit",
    "Ended",
    "Estimator",
    "Executor",
    "Factorisation",
    "Inverse",
    "Layer",
    "LayerSamples",
    "Likelihood",
    "Moment",
    "Moments",
    "Momentum",
    "Notice",
    "Optimizer",
    "Part",
    "Problem",
    "ProblemData",
    "Side",
    "Sink",
    "Split",
    "StepReport",
    "Terms",
    "Trust",
    "Use",
]

_HOMES = {
    "Approximation": "approx",
    "Block": "block",
    "Damping": "damping",
    "Emit": "layer",
    "Ended": "executor",
    "Estimator": "estimator",
    "Executor": "executor",
    "Factorisation": "approx",
    "Inverse": "inverse",
    "Layer": "layer",
    "LayerSamples": "samples",
    "Likelihood": "likelihood",
    "Momentum": "momentum",
    "Moment": "moment",
    "Moments": "moment",
    "Notice": "inverse",
    "Optimizer": "optimizer",
    "Part": "base",
    "Problem": "problem",
    "ProblemData": "problem",
    "Side": "block",
    "Sink": "sink",
    "Split": "problem",
    "StepReport": "optimizer",
    "Terms": "likelihood",
    "Trust": "trust",
    "Use": "layer",
}


def __getattr__(name: str) -> Any:
    """Load a role on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfacore.roles' has no attribute {name!r}")
    return getattr(import_module(f"kfacore.roles.{_HOMES[name]}"), name)
