"""The abstract roles that components play. Importing this package imports torch."""

from kfacore.roles.approx import Approximation, Factorisation, Inverse, Notice
from kfacore.roles.base import Part
from kfacore.roles.damping import Damping
from kfacore.roles.estimator import Estimator, LayerSamples
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.momentum import Momentum
from kfacore.roles.optimizer import Optimizer, StepReport
from kfacore.roles.problem import Problem, ProblemData, Split
from kfacore.roles.sink import Sink

__all__ = [
    "Approximation",
    "Damping",
    "Estimator",
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
