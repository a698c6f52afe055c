"""Metrics sinks: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, SinkConfig

__all__ = ["COMPONENTS", "JsonlConfig"]


class JsonlConfig(SinkConfig):
    """Options of the JSON Lines sink."""

    kind: Literal["jsonl"] = "jsonl"


COMPONENTS: tuple[Component, ...] = (
    Component(
        "sink", "jsonl", JsonlConfig, "kfac_plugins.sinks.jsonl:Jsonl", "One JSON object an event, in metrics.jsonl."
    ),
)
