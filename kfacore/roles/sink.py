"""The role of a metrics sink: where the events of a run go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfacore.roles.base import Part
from kfacore.schema.slots import SinkConfig

__all__ = ["Sink"]


class Sink(Part):
    """Receives every event of a run, in order.

    Life: `open` once, `write` for every event, `close` once, also after an error.
    """

    config: SinkConfig

    @abstractmethod
    def open(self, run: Path, *, step: int) -> None:
        """Start writing into the run folder; events after ``step`` of an earlier life are to be forgotten."""

    @abstractmethod
    def write(self, event: Mapping[str, Any]) -> None:
        """Take one event: ``{"event": "step", "step": 3, "loss": 120.5, ...}``, plain Python values."""

    @abstractmethod
    def flush(self) -> None:
        """Make everything written so far durable (called at checkpoints)."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release."""
