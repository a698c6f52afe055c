"""From layers to one validated configuration.

Precedence: component defaults < the problem's suggestions < preset < files in order < flags < ``--set``. The preset is
applied first, wherever it is named. What the preset "default" says of mini-batches, averaging and evaluation is what is
best in general, and gives way to what a problem knows of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kfacore.errors import ConfigError
from kfacore.lab.config.hints import elsewhere
from kfacore.lab.config.run import RunConfig, run_config_model
from kfacore.lab.config.sources import UnknownKeyError, file_layer, flag_layer, set_layer, table_layer
from kfacore.registry.compose import Composer, Layer, find_component, known_names, origin_of, preset_layer
from kfacore.schema.explain import explain
from kfacore.schema.presets import DEFAULT_PRESET
from kfacore.schema.slots import ProblemConfig
from kfacore.schema.table import PART_SLOTS, RUN_SLOTS, SLOT_DEFAULTS, SLOTS

if TYPE_CHECKING:
    from kfacore.plugin import Component
    from kfacore.registry import Registry

__all__ = ["read_saved", "resolve", "resolve_layers", "user_layers"]


def resolve(
    registry: Registry,
    *,
    preset: str | None = None,
    files: Sequence[str | PathLike[str]] = (),
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> RunConfig:
    """Compose the configuration of a run.

    Args:
        registry: Where the components come from.
        preset: Name of a preset, ``--preset``.
        files: TOML files (or ``config.json`` of runs), in rising precedence.
        flags: Values of named flags by (dotted) key, ``{"steps": 100, "problem.data_dir": "data"}``; None is not given.
        sets: Assignments ``KEY=VALUE`` with dotted keys.

    Returns:
        The complete, validated configuration. Files of the problem that are there are named from the root, so that the
        run can go on from another folder.

    Raises:
        ConfigError: A key, name or value is wrong; the message says where it came from and the nearest right one.
        PluginError: A component that was named belongs to a plug-in that cannot be used.
    """
    named = {"preset": preset} if preset is not None else {}
    config = resolve_layers(registry, user_layers(registry, files, {**(flags or {}), **named}, sets))
    return config.model_copy(update={"problem": config.problem.located()})


def user_layers(
    registry: Registry, files: Sequence[str | PathLike[str]], flags: Mapping[str, Any], sets: Sequence[str]
) -> list[Layer]:
    """What the user wrote, in rising precedence: files, flags, assignments.

    Raises:
        ConfigError: A file cannot be read, or a key is unknown; the message has the nearest right one of all
            components.
    """
    try:
        return [*(file_layer(path) for path in files), flag_layer(flags), set_layer(sets)]
    except UnknownKeyError as error:
        raise UnknownKeyError(error.key, error.origin, registry) from None


def resolve_layers(registry: Registry, user: Sequence[Layer]) -> RunConfig:
    """Compose the configuration of a run from what was written, in rising precedence.

    Args:
        registry: Where the components come from.
        user: The layers. Those that are not marked as the user's may hold slots that the optimizer does not use.

    Returns:
        The complete, validated configuration.

    Raises:
        ConfigError: As `resolve`.
        PluginError: As `resolve`.
    """
    top = next((layer for layer in reversed(user) if "preset" in layer.values), None)
    name = top.values["preset"] if top is not None else DEFAULT_PRESET
    chosen = preset_layer(name, top.origin_of(("preset",)) if top is not None else "the built-in default")
    kinds = {slot: kind for slot, kind in SLOT_DEFAULTS.items() if slot in RUN_SLOTS}
    defaults = table_layer({**kinds, "preset": name}, "the built-in default", user=False)
    suggested = _suggestions(registry, [defaults, chosen, *user])
    below = [defaults, suggested, chosen]
    if name == DEFAULT_PRESET:
        own = {key: value for key, value in suggested.values.items() if key not in SLOTS}
        below.append(table_layer(own, suggested.origin, user=False))
    return _compose(registry, [*below, *user])


def read_saved(registry: Registry, values: Mapping[str, Any]) -> RunConfig:
    """Read a saved configuration.

    Args:
        registry: Where the components come from.
        values: What `RunConfig.as_dict` returned; nothing is taken from presets or suggested by the problem.

    Raises:
        ConfigError: A key, name or value is wrong, for example of a component that is not installed any more.
        PluginError: A component's plug-in cannot be used.
    """
    saved = table_layer(values, "saved configuration", user=True)
    if not isinstance(saved.values.get("preset", ""), str):
        raise ConfigError(f"saved configuration: preset = {saved.values['preset']!r} is not a name")
    return _compose(registry, [saved])


def _compose(registry: Registry, layers: Sequence[Layer]) -> RunConfig:
    """Lay the layers over each other, keep what the optimizer uses, validate."""
    optimizer = _component(registry, "optimizer", layers)
    unused = [slot for slot in PART_SLOTS if slot not in optimizer.uses]
    composer = Composer(registry, lambda key, slot: elsewhere(key, slot, registry))
    for layer in layers:
        for key in layer.values:
            if key in unused:
                _refuse_unused(key, layer, optimizer)
            else:
                composer.lay(layer, key)
    composer.drop_foreign(PART_SLOTS)
    return _validate(composer, optimizer)


def _validate(composer: Composer, optimizer: Component) -> RunConfig:
    """Config objects for the slots, then the whole."""
    tree, registry = composer.tree, composer.registry
    for slot in (slot for slot in RUN_SLOTS if slot not in PART_SLOTS or slot in optimizer.uses):
        if SLOTS[slot].many:
            items = tree.get(slot, [])
            tree[slot] = [composer.config(slot, item, (slot, index)) for index, item in enumerate(items)]
        elif slot in tree:
            tree[slot] = composer.config(slot, tree[slot], (slot,))
        elif slot == "likelihood":
            raise ConfigError(
                f"the problem '{tree['problem'].kind}' suggests no likelihood, "
                f"choose one with --set likelihood=NAME, {known_names(registry, slot)}"
            )
        else:
            raise ConfigError(f"saved configuration: {slot} is missing, the optimizer '{optimizer.name}' uses it")
    model = run_config_model(registry)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, model, origin=lambda place: origin_of(composer.origins, place))) from error


def _component(registry: Registry, slot: str, layers: Sequence[Layer]) -> Component:
    """The component of a slot that the topmost layer with a kind names."""
    for layer in reversed(layers):
        if "kind" in layer.values.get(slot, {}):
            return find_component(registry, slot, layer.values[slot]["kind"], layer.origin_of((slot, "kind")))
    raise ConfigError(f"{layers[-1].origin}: {slot} is missing, {known_names(registry, slot)}")


def _suggestions(registry: Registry, layers: Sequence[Layer]) -> Layer:
    """What the problem suggests; it may not choose other problems or presets."""
    problem = _component(registry, "problem", layers)
    values: Mapping[str, Any] = getattr(problem.config, "run_defaults", {})
    if getattr(problem.config, "suggestions", None) not in (None, ProblemConfig.suggestions):  # it looks at its options
        config = _compose_slot(registry, "problem", layers)
        values = config.suggestions().values
    origin = f"suggestions of the problem '{problem.name}'"
    for key in ("problem", "preset"):
        if key in values:
            raise ConfigError(f"{origin}: '{key}' cannot be suggested; this is a defect of the problem")
    return table_layer(values, origin, user=False)


def _compose_slot(registry: Registry, slot: str, layers: Sequence[Layer]) -> Any:
    """The config object of one slot alone."""
    composer = Composer(registry, lambda key, where: elsewhere(key, where, registry))
    for layer in layers:
        if slot in layer.values:
            composer.lay(layer, slot)
    return composer.config(slot, composer.tree[slot], (slot,))


def _refuse_unused(slot: str, layer: Layer, optimizer: Component) -> None:
    """What the user wrote for a slot that the optimizer does not use is an error; from elsewhere it is left out."""
    if not layer.user:
        return
    used = [name for name in PART_SLOTS if name in optimizer.uses]
    raise ConfigError(
        f"{layer.origin_of((slot,))}: the optimizer '{optimizer.name}' does not use {slot} "
        f"(it uses {', '.join(used) if used else 'none of ' + ', '.join(PART_SLOTS)})"
    )
