"""The public face for plug-in authors: `hookimpl`, `Component` and the API version.

A distribution that offers components to kfacore names a module under the entry-point group ``kfac``. That module
implements `kfac_components` and returns light manifests; it must not import torch, because listing, help and
completion read every manifest. The class that a manifest names is imported only to be built.

Example:
    ```python
    from typing import Literal
    from kfacore.plugin import ApproxConfig, Component, hookimpl

    class DiagonalConfig(ApproxConfig):
        kind: Literal["diagonal"] = "diagonal"

    @hookimpl
    def kfac_components():
        return [Component("approx", "diagonal", DiagonalConfig, "my_kfac.diagonal:Diagonal", "Diagonal of the Fisher.")]
    ```
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pluggy

from kfacore.schema.slots import (
    ApproxConfig,
    DampingConfig,
    EstimatorConfig,
    ExecutorConfig,
    LayerConfig,
    LikelihoodConfig,
    MomentumConfig,
    OptimizerConfig,
    PiRule,
    ProblemConfig,
    SinkConfig,
    SlotConfig,
    Suggestions,
    TrustConfig,
)
from kfacore.schema.table import SLOTS, Slot

__all__ = [
    "API_VERSION",
    "SLOTS",
    "ApproxConfig",
    "Component",
    "DampingConfig",
    "EstimatorConfig",
    "ExecutorConfig",
    "LayerConfig",
    "LikelihoodConfig",
    "MomentumConfig",
    "OptimizerConfig",
    "PiRule",
    "ProblemConfig",
    "SinkConfig",
    "Slot",
    "SlotConfig",
    "Suggestions",
    "TrustConfig",
    "hookimpl",
    "hookspec",
]

PROJECT = "kfac"
"""Name of the hook project and of the entry-point group."""

API_VERSION = 1
"""Raised whenever a role changes in a way that breaks plug-ins. A module may state ``KFAC_API = 1``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Component:
    """A manifest: what the registry must know of an implementation without importing it.

    Attributes:
        slot: One of `SLOTS`.
        name: The name users write, also the ``kind`` of the config model.
        config: The config model, a subclass of the slot's base with ``kind: Literal[name] = name``.
        target: Where the class is, ``"module:Class"``; a subclass of the slot's role in `kfacore.roles`.
        summary: One line for ``kfac list``.
        uses: For optimizers: the slots that this optimizer reads from the configuration.
    """

    slot: str
    name: str
    config: type[SlotConfig]
    target: str
    summary: str
    uses: frozenset[str] = field(default=frozenset())


class HookSpecs:
    """The hooks a plug-in may implement."""

    @hookspec
    def kfac_components(self) -> list[Component]:  # type: ignore[empty-body]  # a hook specification has no body
        """Return the manifests of the components this plug-in offers."""


def kind_of(config: type[SlotConfig]) -> Any:
    """The default of the model's ``kind``, the name under which it is registered."""
    return config.model_fields["kind"].default
