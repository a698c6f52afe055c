"""The abstract roles that components play, loaded on first use: most of them need torch, executors and sinks do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "approx": (
            "Approximation",
            "Factorisation",
        ),
        "base": ("Part",),
        "block": (
            "Block",
            "Side",
        ),
        "damping": ("Damping",),
        "estimator": ("Estimator",),
        "executor": (
            "Ended",
            "Executor",
        ),
        "inverse": (
            "Inverse",
            "Notice",
        ),
        "layer": (
            "Emit",
            "Layer",
            "Use",
        ),
        "likelihood": (
            "Likelihood",
            "Terms",
        ),
        "moment": (
            "Moment",
            "Moments",
        ),
        "momentum": ("Momentum",),
        "optimizer": (
            "Optimizer",
            "StepReport",
        ),
        "problem": (
            "Problem",
            "ProblemData",
            "Split",
        ),
        "samples": ("LayerSamples",),
        "sink": ("Sink",),
        "trust": ("Trust",),
    },
)
