"""The built-in plug-ins, one mathematical object a file, registered through the same hook as anybody else's.

Every slot's folder lists its manifests in ``COMPONENTS``; nothing here or there imports torch.
"""

from __future__ import annotations

from importlib import import_module

from kfacore.plugin import API_VERSION, SLOTS, Component, hookimpl

__all__ = ["KFAC_API", "kfac_components"]

KFAC_API = API_VERSION

_MANIFESTS = [import_module(f"{__name__}.{slot.folder}").COMPONENTS for slot in SLOTS.values()]


@hookimpl
def kfac_components() -> list[Component]:
    """The manifests of everything built in, slot by slot."""
    return [component for components in _MANIFESTS for component in components]
