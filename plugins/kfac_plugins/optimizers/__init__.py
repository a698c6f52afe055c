"""Optimizers: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import Component, OptimizerConfig

__all__ = [
    "COMPONENTS",
    "AdamConfig",
    "AdamWConfig",
    "GuestConfig",
    "KfacOptimizerConfig",
    "MuonConfig",
    "NesterovConfig",
    "SgdConfig",
]

Rate = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]


class KfacOptimizerConfig(OptimizerConfig):
    """K-FAC; its options are those of the slots estimator, approx, damping, momentum and trust."""

    kind: Literal["kfac"] = "kfac"
    autocast: Literal["bfloat16"] | None = None
    """Mixed precision: dtype of the forward and backward passes; the algebra keeps the run's dtype."""
    unsupported: Literal["serve", "error"] = "serve"
    """Models beyond Linear layers that are called once on one row an example: serve them, or refuse them by name."""
    output: str | None = None
    """Name of z in what the model returns, where that is no tensor; "logits" and the first tensor are found."""
    reduce: tuple[str, ...] = ()
    """Blocks whose positions are pooled, by name: their rows are summed over an example's positions first."""


class NesterovConfig(OptimizerConfig):
    """Options of SGD with Nesterov momentum, the paper's baseline."""

    kind: Literal["nesterov"] = "nesterov"
    lr: Rate = 0.01
    """Learning rate (epsilon)."""
    mu_max: Below1 = 0.99
    """Largest momentum coefficient; the schedule rises from 1/2 towards it."""


class SgdConfig(OptimizerConfig):
    """Options of torch's SGD."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.01
    """Learning rate."""
    momentum: Below1 = 0.9
    """Momentum coefficient; 0 is plain SGD."""
    nesterov: bool = False
    """Torch's form of Nesterov momentum (needs momentum above 0)."""


class _Averages(OptimizerConfig):
    """What Adam and AdamW have in common."""

    lr: Rate = 0.001
    """Learning rate."""
    beta1: Below1 = 0.9
    """Decay of the average of gradients."""
    beta2: Below1 = 0.999
    """Decay of the average of squared gradients."""
    eps: Rate = 1e-8
    """Added to the denominator."""


class AdamConfig(_Averages):
    """Options of torch's Adam."""

    kind: Literal["adam"] = "adam"


class AdamWConfig(_Averages):
    """Options of torch's AdamW."""

    kind: Literal["adamw"] = "adamw"
    decay: NotNegative = 0.01
    """Decoupled decay: lr times this share of a weight goes in a step, beside weight_decay, which the objective has."""


class MuonConfig(OptimizerConfig):
    """Options of Muon, with AdamW on vectors and embeddings at the same rate, which moves both about as far."""

    kind: Literal["muon"] = "muon"
    lr: Rate = 0.003
    """Learning rate."""
    momentum: Below1 = 0.95
    """Momentum coefficient."""
    decay: NotNegative = 0.0
    """Decoupled decay: lr times this share of a weight goes in a step, beside weight_decay, which the objective has."""


class GuestConfig(OptimizerConfig):
    """Options of `kfacore.Preconditioned`: another optimizer's steps along K-FAC's directions."""

    kind: Literal["guest"] = "guest"
    base: Literal["adamw", "muon", "sgd"] = "adamw"
    """The optimizer around which it is; what is not said here are that one's defaults."""
    lr: Rate = 0.001
    """Learning rate."""
    decay: NotNegative = 0.0
    """Decoupled decay: lr times this share of a weight goes in a step, beside weight_decay, which the objective has."""
    every: Annotated[int, Field(strict=True, ge=1)] = 10
    """Steps between two statistics and refreshes."""
    scale: Literal["graft", "kl", "none"] = "graft"
    """K-FAC's direction with the base's step length, a trust region in its place, or neither."""
    damping: Rate = 0.1
    """Each block's gamma is this times its mean scale."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "optimizer",
        "kfac",
        KfacOptimizerConfig,
        "kfacore.optim.kfac:KFAC",
        "K-FAC: Kronecker-factored curvature with exact re-scaling and momentum.",
        uses=frozenset({"estimator", "approx", "damping", "momentum", "trust"}),
    ),
    Component(
        "optimizer",
        "nesterov",
        NesterovConfig,
        "kfac_plugins.optimizers.nesterov:Nesterov",
        "SGD with Nesterov momentum and the schedule of Sutskever et al. (2013).",
    ),
    Component("optimizer", "sgd", SgdConfig, "kfac_plugins.optimizers.torch_optimizers:Sgd", "torch.optim.SGD."),
    Component("optimizer", "adam", AdamConfig, "kfac_plugins.optimizers.torch_optimizers:Adam", "torch.optim.Adam."),
    Component(
        "optimizer", "adamw", AdamWConfig, "kfac_plugins.optimizers.torch_optimizers:AdamW", "torch.optim.AdamW."
    ),
    Component(
        "optimizer",
        "muon",
        MuonConfig,
        "kfac_plugins.optimizers.torch_optimizers:Muon",
        "Muon on weight matrices, AdamW on the rest.",
    ),
    Component(
        "optimizer",
        "guest",
        GuestConfig,
        "kfac_plugins.optimizers.guest:Guest",
        "K-FAC's directions in the steps of AdamW, Muon or SGD (kfacore.Preconditioned).",
        uses=frozenset({"estimator", "approx"}),
    ),
)
