"""The name of a run: a hash of all that its numbers depend on, so that nothing is run twice. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import kfacore
from kfacore.schema.table import RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["FREE_KEYS", "core_versions", "relevant", "run_hash", "run_versions"]

FREE_KEYS = (("preset",), ("sink",), ("checkpoint",), ("pictures",), ("problem", "data_dir"))
"""Keys that cannot change a result: a preset's values are in the other keys; the rest says where and how often only.

Threads and device stay in, because they change the last bits of the parameters and the seconds; so does ``eval``, which
decides when a target is seen to be reached."""


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration in JSON types without `FREE_KEYS`."""
    content: dict[str, Any] = json.loads(json.dumps(config))
    for *tables, key in FREE_KEYS:
        table = content
        for name in tables:
            table = table.get(name) or {}
        table.pop(key, None)
    if content.get("processes") == 1:  # as ever
        del content["processes"]
    return content


def core_versions() -> dict[str, str]:
    """Versions of what every run computes with."""
    return {
        "kfacore": kfacore.__version__,
        **{name: _version(name) for name in ("torch", "numpy")},
    }


@cache
def _version(distribution: str) -> str:
    """Kept, because a study asks for each of its runs and the answer is a file to be read."""
    return metadata.version(distribution)


def run_versions(registry: Registry, config: RunConfig) -> dict[str, str]:
    """Versions that a run's numbers depend on: `core_versions`, and the distributions of its components.

    Args:
        registry: Where the components are.
        config: The run's configuration.
    """
    versions = core_versions()
    for slot in RUN_SLOTS:
        value = getattr(config, slot)
        if value is None or SLOTS[slot].many:
            continue
        origin = registry.origin(registry.find(slot, value.kind))
        if origin.distribution:
            versions.setdefault(origin.distribution, origin.version)
    return versions


def run_hash(registry: Registry, config: RunConfig) -> str:
    """The name of a run.

    Args:
        registry: Where the components are.
        config: The run's configuration.

    Returns:
        16 hexadecimal digits of a SHA-256.
    """
    content = {"config": relevant(config.as_dict()), "versions": run_versions(registry, config)}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
