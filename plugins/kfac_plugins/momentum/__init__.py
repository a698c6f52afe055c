"""Momentum rules: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kfacore.plugin import Component, MomentumConfig

__all__ = ["COMPONENTS", "FixedMomentumConfig", "NoMomentumConfig", "QuadraticModelConfig"]


class QuadraticModelConfig(MomentumConfig):
    """Options of parameter-free momentum."""

    kind: Literal["quadratic-model"] = "quadratic-model"
    """Name of the implementation."""

    mu_min: float | None = None
    """Least mu; beyond it alpha is the best one for this mu. The minimum is anywhere if left out."""
    mu_max: float | None = None
    """Largest mu, likewise."""

    @model_validator(mode="after")
    def _in_order(self) -> QuadraticModelConfig:
        if self.mu_min is not None and self.mu_max is not None and self.mu_min > self.mu_max:
            raise ValueError(f"mu_min must not be above mu_max, found {self.mu_min:g} and {self.mu_max:g}")
        return self


class NoMomentumConfig(MomentumConfig):
    """Options of re-scaling without momentum."""

    kind: Literal["none"] = "none"
    """Name of the implementation."""


class FixedMomentumConfig(MomentumConfig):
    """Options of a given learning rate and momentum."""

    kind: Literal["fixed"] = "fixed"
    """Name of the implementation."""

    lr: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate: alpha of every step."""
    mu: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Momentum: mu of every step."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "momentum",
        "quadratic-model",
        QuadraticModelConfig,
        "kfac_plugins.momentum.quadratic_model:QuadraticModelMomentum",
        "alpha and mu minimise the exact quadratic model (section 7); nothing to tune.",
    ),
    Component(
        "momentum",
        "none",
        NoMomentumConfig,
        "kfac_plugins.momentum.none:NoMomentum",
        "alpha minimises the exact quadratic model (section 6.4); no momentum.",
    ),
    Component(
        "momentum",
        "fixed",
        FixedMomentumConfig,
        "kfac_plugins.momentum.fixed:FixedMomentum",
        "A given learning rate and momentum; no quadratic model unless the damping needs it.",
    ),
)
