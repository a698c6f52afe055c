"""Damping strategies: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import Component, DampingConfig

__all__ = ["COMPONENTS", "FixedDampingConfig", "LevenbergMarquardtConfig"]

Positive = Annotated[float, Field(gt=0.0)]
Period = Annotated[int, Field(ge=1)]


class LevenbergMarquardtConfig(DampingConfig):
    """Options of adaptive damping."""

    kind: Literal["levenberg-marquardt"] = "levenberg-marquardt"
    """Name of the implementation."""

    lambda0: Positive | None = 150.0
    """First lambda, the authors' value for the autoencoders; none takes a share of the first batch's curvature."""
    lambda_every: Period = 5
    """Steps between adaptations of lambda (T_1)."""
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """What lambda is multiplied with a step while the model is good; w1 = rate^T_1."""
    confirmed: bool = False
    """Lower lambda only while new mini-batches see any decrease from the last steps."""
    gamma_rule: Literal["compared", "tied"] = "compared"
    """Where gamma comes from: comparing three every T_2 steps, or always sqrt(lambda + weight decay)."""
    gamma_every: Period = 20
    """Steps between comparisons of three gammas (T_2)."""
    gamma_min: Annotated[float, Field(ge=0.0)] | None = None
    """Lower clamp of the candidates of gamma; the square root of the weight decay if left out."""
    gamma_max: Positive | None = 1.0
    """Upper clamp of the candidates of gamma, as in the authors' program."""


class FixedDampingConfig(DampingConfig):
    """Options of constant damping."""

    kind: Literal["fixed"] = "fixed"
    """Name of the implementation."""

    lambda0: Annotated[float, Field(ge=0.0)] = 0.0
    """lambda of the quadratic model."""
    gamma: Positive | None = None
    """gamma of the approximate inverse; sqrt(lambda0 + weight decay) if left out."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "damping",
        "levenberg-marquardt",
        LevenbergMarquardtConfig,
        "kfac_plugins.damping.levenberg_marquardt:LevenbergMarquardt",
        "lambda by the reduction ratio, gamma by comparing candidates (sections 6.5, 6.6).",
    ),
    Component(
        "damping",
        "fixed",
        FixedDampingConfig,
        "kfac_plugins.damping.fixed:FixedDamping",
        "Constant lambda and gamma.",
    ),
)
