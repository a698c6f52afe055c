"""Likelihoods built in: config models and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import Component, LikelihoodConfig

__all__ = ["COMPONENTS", "BernoulliConfig", "CategoricalConfig", "GaussianConfig"]

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class BernoulliConfig(LikelihoodConfig):
    """Independent binary outputs, z the log-odds; targets may be any number in [0, 1]."""

    kind: Literal["bernoulli"] = "bernoulli"
    """Name of the implementation."""
    mean_outputs: bool = False
    """Take the mean over outputs instead of their sum, as torch's losses do."""
    weight: tuple[Weight, ...] | None = None
    """Factor of each output's term; one number for all, or one an output."""
    pos_weight: tuple[Weight, ...] | None = None
    """Factor of each output's term where the target is 1; one number for all, or one an output."""


class CategoricalConfig(LikelihoodConfig):
    """One of c classes, z the unnormalised log-probabilities; targets are class numbers."""

    kind: Literal["categorical"] = "categorical"
    """Name of the implementation."""
    ignore_index: int | None = None
    """Positions whose target is this number do not count (torch's losses: -100); by default there is none."""
    label_smoothing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of each target that is spread evenly over the classes. It leaves the Fisher as it is."""
    weight: tuple[Weight, ...] | None = None
    """Factor of each class's terms; a mean over positions is then divided by the sum of the factors."""
    soft: bool = False
    """Take rows of class probabilities as targets too."""


class GaussianConfig(LikelihoodConfig):
    """Real outputs with a known variance, z the mean."""

    kind: Literal["gaussian"] = "gaussian"
    """Name of the implementation."""
    mean_outputs: bool = False
    """Take the mean over outputs instead of their sum, as torch's losses do."""
    variance: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Variance of every output."""


COMPONENTS = (
    Component(
        "likelihood",
        "bernoulli",
        BernoulliConfig,
        "kfac_plugins.likelihoods.bernoulli:Bernoulli",
        "Independent binary outputs (sigmoid); targets in [0, 1].",
    ),
    Component(
        "likelihood",
        "categorical",
        CategoricalConfig,
        "kfac_plugins.likelihoods.categorical:Categorical",
        "One of c classes (softmax); integer targets.",
    ),
    Component(
        "likelihood",
        "gaussian",
        GaussianConfig,
        "kfac_plugins.likelihoods.gaussian:Gaussian",
        "Real outputs with a known variance (squared error).",
    ),
)
"""Manifests of this slot."""
