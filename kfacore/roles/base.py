"""What all roles share: a config object, kept as ``self.config``."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, Generic, TypeVar

from kfacore.config.slots import SlotConfig

__all__ = ["Part"]

C = TypeVar("C", bound=SlotConfig)


class Part(ABC, Generic[C]):
    """Base of every role: built from its config model and nothing else.

    Args:
        config: The component's config object; its class's defaults if left out.

    Attributes:
        Config: The component's config model, set by each implementation.
        config: The config object.
    """

    Config: ClassVar[type[SlotConfig]]

    def __init__(self, config: C | None = None) -> None:
        # The cast-free route: an implementation's Config is its C by contract, which typing cannot express.
        self.config: C = self.Config() if config is None else config  # type: ignore[assignment, call-arg]
