"""Low-rank linear layers as a plug-in for kfacore: config and manifest.

kfacore imports this module for every command, so it must not import torch; the module is in `kfac_lowrank.module`, the
layer type in `kfac_lowrank.layer`, which is imported only when a layer type is built.
"""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, LayerConfig, hookimpl

__all__ = ["KFAC_API", "LowRankConfig", "kfac_components"]

KFAC_API = 1
"""The plug-in API that this was written for; kfacore refuses by name what it cannot serve."""


class LowRankConfig(LayerConfig):
    """Options of low-rank linear layers: none."""

    kind: Literal["lowrank"] = "lowrank"
    """Name of the implementation."""


@hookimpl
def kfac_components() -> list[Component]:
    """The manifests of this distribution: one layer type."""
    return [
        Component(
            "layer",
            "lowrank",
            LowRankConfig,
            "kfac_lowrank.layer:LowRankLayer",
            "Linear layers of low rank, y = U D x + b: blocks down and up.",
        )
    ]
