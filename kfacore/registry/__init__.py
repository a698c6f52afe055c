"""The registry: finds plug-ins, checks their manifests in isolation, and builds components by name.

Importing this package, reading manifests and validating configurations imports no torch; loading a target does.
"""

from kfacore.registry.discovery import DISABLE_VARIABLE, PluginStatus
from kfacore.registry.lookup import Registry, get_registry, reset_registry

__all__ = ["DISABLE_VARIABLE", "PluginStatus", "Registry", "get_registry", "reset_registry"]
