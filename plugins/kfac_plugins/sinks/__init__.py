"""Metrics sinks: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import Component, SinkConfig

__all__ = ["COMPONENTS", "JsonlConfig", "TensorboardConfig"]


class JsonlConfig(SinkConfig):
    """Options of the JSON Lines sink."""

    kind: Literal["jsonl"] = "jsonl"


class TensorboardConfig(SinkConfig):
    """Options of the TensorBoard sink (extra ``kfacore[tensorboard]``)."""

    kind: Literal["tensorboard"] = "tensorboard"
    """Name of the implementation."""
    folder: str = "tensorboard"
    """Folder of the event files, in the run folder; a path from the root keeps many runs in one place."""
    flush_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    """Seconds between two writings to the disk, besides those at checkpoints."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "sink", "jsonl", JsonlConfig, "kfac_plugins.sinks.jsonl:Jsonl", "One JSON object an event, in metrics.jsonl."
    ),
    Component(
        "sink",
        "tensorboard",
        TensorboardConfig,
        "kfac_plugins.sinks.tensorboard:Tensorboard",
        "Event files for TensorBoard (extra [tensorboard]).",
    ),
)
