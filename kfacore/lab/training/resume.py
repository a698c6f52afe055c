"""The configuration of a resumed run: the saved one, with changes only where they cannot change what is computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import ConfigError, DataError
from kfacore.lab.config.resolve import read_saved, user_layers
from kfacore.lab.training.run import RunFolder
from kfacore.registry.compose import Layer, deep_update
from kfacore.schema.slots import NONE

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["resume_config", "warn_of_changes"]

logger = logging.getLogger("kfacore.lab.training")

_FREE = (
    ("steps",),
    ("budget",),
    ("device",),
    ("threads",),
    ("processes",),
    ("sink",),
    ("eval",),
    ("checkpoint",),
    ("pictures",),
    ("problem", "data_dir"),
    ("problem", "file"),
    ("problem", "folder"),
)
"""Keys that say how long, where and how often, but not what is computed: data is known by its checksum."""


def resume_config(
    registry: Registry,
    run: Path,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    files: Sequence[Path] = (),
) -> RunConfig:
    """Read a run's configuration and lay over it what the user gives on resuming.

    Args:
        registry: Where the components are.
        run: The run folder.
        flags: Named flags by key; None is not given.
        sets: ``KEY=VALUE`` assignments.
        files: Configuration files.

    Returns:
        The saved configuration with steps, budget, device, threads, sinks, intervals and the data's place as given now.

    Raises:
        ConfigError: A given key would change what is computed; the message has its origin and both values.
        DataError: The folder holds no run, or its configuration is damaged.
    """
    folder = RunFolder(run)
    saved = folder.read_config()
    layers = user_layers(registry, files, flags or {}, sets)
    changed: dict[str, Any] = {}
    deep_update(changed, saved)
    for layer in layers:
        for location, value in _leaves((), layer.values):
            _refuse_conflict(layer, location, value, saved, run)
        deep_update(changed, layer.values)
    try:
        return read_saved(registry, changed if any(layer.values for layer in layers) else saved)
    except ConfigError as error:
        if any(layer.values for layer in layers):
            raise
        raise DataError(f"{folder.config_file} is not the configuration of a run: {error}") from error


def warn_of_changes(record: Mapping[str, Any], device: str, processes: int = 1) -> None:
    """Say what keeps a resumed run from being bit for bit the one that never stopped.

    Args:
        record: The run's manifest.
        device: The device of now, in words.
        processes: How many train it now.
    """
    import torch

    versions = record.get("versions", {})
    now = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    now["processes"] = processes
    then = {"torch": versions.get("torch"), "device": record.get("device"), "threads": record.get("threads")}
    then["processes"] = record.get("processes", 1)
    for name, value in now.items():
        if value != then[name]:
            logger.warning(
                "resumed with %s %s, started with %s %s: the numbers may differ in the last bits",
                name,
                value,
                name,
                then[name],
            )


def _refuse_conflict(layer: Layer, location: tuple[str, ...], value: Any, saved: Mapping[str, Any], run: Path) -> None:
    if any(location[: len(free)] == free for free in _FREE):
        return
    found: Any = saved
    for key in location:
        found = found.get(key) if isinstance(found, Mapping) else None
    if found == value or (found is None and value == NONE):
        return
    key = ".".join(location).removesuffix(".kind")
    raise ConfigError(
        f"{layer.origin_of(location)}: a resumed run keeps its configuration, and {run} has {key} = {found!r}; "
        f"leave it out, or start a new run without --resume"
    )


def _leaves(location: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves((*location, str(key)), item)
    elif location:
        yield location, value
