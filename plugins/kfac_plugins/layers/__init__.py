"""Layer types: configs and manifests. Imports no torch.

The network takes every one of them; the first whose `matches` says yes reads a module.
"""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, LayerConfig

__all__ = ["COMPONENTS", "LinearConfig"]


class LinearConfig(LayerConfig):
    """Options of linear layers."""

    kind: Literal["linear"] = "linear"
    """Name of the implementation."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "layer",
        "linear",
        LinearConfig,
        "kfac_plugins.layers.linear:LinearLayer",
        "torch.nn.Linear over any positions: one Kronecker block, its rows are the inputs.",
    ),
)
