"""Statistics estimators: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, EstimatorConfig

__all__ = ["COMPONENTS", "EmpiricalConfig", "ExactConfig", "MonteCarloConfig"]


class MonteCarloConfig(EstimatorConfig):
    """Options of the Monte-Carlo estimator."""

    kind: Literal["monte-carlo"] = "monte-carlo"
    """Name of the implementation."""


class EmpiricalConfig(EstimatorConfig):
    """Options of the empirical estimator."""

    kind: Literal["empirical"] = "empirical"
    """Name of the implementation."""


class ExactConfig(EstimatorConfig):
    """Options of the exact estimator."""

    kind: Literal["exact"] = "exact"
    """Name of the implementation."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "estimator",
        "monte-carlo",
        MonteCarloConfig,
        "kfac_plugins.estimators.monte_carlo:MonteCarlo",
        "One backward pass with targets sampled from the model (section 5).",
    ),
    Component(
        "estimator",
        "empirical",
        EmpiricalConfig,
        "kfac_plugins.estimators.empirical:Empirical",
        "One backward pass with the training targets: the empirical Fisher, for comparison.",
    ),
    Component(
        "estimator",
        "exact",
        ExactConfig,
        "kfac_plugins.estimators.exact:Exact",
        "No sampling: one backward pass an output through the square root of the Fisher metric.",
    ),
)
