"""Likelihoods built in: config models and manifests. Imports no torch."""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, LikelihoodConfig

__all__ = ["COMPONENTS", "BernoulliConfig", "CategoricalConfig", "GaussianConfig"]


class BernoulliConfig(LikelihoodConfig):
    """Independent binary outputs, z the log-odds; targets may be any number in [0, 1]."""

    kind: Literal["bernoulli"] = "bernoulli"
    """Name of the implementation."""


class CategoricalConfig(LikelihoodConfig):
    """One of c classes, z the unnormalised log-probabilities; targets are class numbers."""

    kind: Literal["categorical"] = "categorical"
    """Name of the implementation."""


class GaussianConfig(LikelihoodConfig):
    """Real outputs with unit variance, z the mean."""

    kind: Literal["gaussian"] = "gaussian"
    """Name of the implementation."""


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
        "Real outputs with unit variance (squared error).",
    ),
)
"""Manifests of this slot."""
