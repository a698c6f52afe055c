"""What all roles share: a config object, kept as ``self.config``."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from kfacore.errors import ConfigError
from kfacore.schema.slots import SlotConfig

__all__ = ["Part"]


class Part(ABC):
    """Base of every role: built from its config model and nothing else.

    An implementation sets ``Config`` to its config model and annotates ``config`` with it.

    Args:
        config: The component's config object; its class's defaults if left out.

    Raises:
        ConfigError: The object is not of the component's config model.
    """

    Config: ClassVar[type[SlotConfig]]
    config: SlotConfig

    def __init__(self, config: SlotConfig | None = None) -> None:
        if config is None:
            config = self.Config.model_validate({})
        if not isinstance(config, self.Config):
            raise ConfigError(f"{type(self).__name__} takes a {self.Config.__name__}, found a {type(config).__name__}")
        self.config = config
