"""From layers to one validated configuration.

Precedence: component defaults < the problem's suggestions < preset < files in order < flags < ``--set``. The preset is
applied first, wherever it is named. What the preset "default" says of mini-batches, averaging and evaluation is what is
best in general, and gives way to what a problem knows of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kfacore.errors import ConfigError, KfacError, nearest
from kfacore.lab.config.hints import elsewhere
from kfacore.lab.config.run import PART_SLOTS, RunConfig, run_config_model
from kfacore.lab.config.sources import (
    Layer,
    Location,
    UnknownKeyError,
    deep_update,
    file_layer,
    flag_layer,
    origin_of,
    set_layer,
    table_layer,
)
from kfacore.plugin import SLOTS
from kfacore.schema.explain import explain
from kfacore.schema.presets import DEFAULT_PRESET, PRESETS
from kfacore.schema.slots import ProblemConfig

if TYPE_CHECKING:
    from kfacore.plugin import Component
    from kfacore.registry import Registry

__all__ = ["SLOT_DEFAULTS", "read_saved", "resolve", "resolve_layers", "user_layers"]

SLOT_DEFAULTS: dict[str, Any] = {
    "problem": "curves",
    "optimizer": "kfac",
    "estimator": "monte-carlo",
    "approx": "tridiag",
    "damping": "levenberg-marquardt",
    "momentum": "quadratic-model",
    "trust": "none",
    "sink": ["jsonl"],
}
"""The component of each slot when nobody names one; the likelihood is the problem's."""

_PRESET = "preset"
"""How the origin of a preset's values begins."""


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
    if not isinstance(name, str) or name not in PRESETS:
        where = top.origin_of(("preset",)) if top is not None else "the built-in default"
        raise ConfigError(f"{where}: unknown preset '{name}', {nearest(str(name), PRESETS)}")
    defaults = table_layer({**SLOT_DEFAULTS, "preset": name}, "the built-in default", user=False)
    chosen = table_layer(PRESETS[name], f"{_PRESET} '{name}'", user=False)
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
    tree: dict[str, Any] = {}
    laid = _Laid()
    for layer in layers:
        for key, value in layer.values.items():
            if key in unused:
                _refuse_unused(key, layer, optimizer)
            else:
                _lay(registry, tree, laid, layer, key, value)
    _drop_foreign(registry, tree, laid.origins)
    return _validate(registry, tree, laid.origins, optimizer)


@dataclass
class _Laid:
    """What is remembered while layers are laid over each other.

    Attributes:
        origins: Where the value of each location comes from.
        written: Locations whose value is the user's.
        bound: Locations whose value was given together with the kind, by a preset or a problem.
    """

    origins: dict[Location, str] = field(default_factory=dict)
    written: set[Location] = field(default_factory=set)
    bound: set[Location] = field(default_factory=set)


def _lay(registry: Registry, tree: dict[str, Any], laid: _Laid, layer: Layer, key: str, value: Any) -> None:
    """Lay one value of a layer over the tree."""
    if key in SLOTS and key != "sink":
        _enter_slot(registry, key, tree, layer, laid)
        chooses = not layer.user and "kind" in value
        for name in value:
            (laid.bound.add if chooses else laid.bound.discard)((key, name))
    if isinstance(value, list):  # replaces the list of lower layers, whose origins must not answer for it
        for location in [known for known in laid.origins if known[0] == key]:
            del laid.origins[location]
    for location in _locations((key,), value):
        laid.origins[location] = layer.origin_of(location)
        (laid.written.add if layer.user else laid.written.discard)(location)
    deep_update(tree, {key: value})


def _drop_foreign(registry: Registry, tree: dict[str, Any], origins: Mapping[Location, str]) -> None:
    """A preset may have keys for several kinds of a slot: leave out those that the chosen kind does not have."""
    for slot in PART_SLOTS:
        table = tree.get(slot, {})
        fields = registry.find(slot, table["kind"]).config.model_fields if table else {}
        for key in [key for key in table if key not in fields and origin_of(origins, (slot, key)).startswith(_PRESET)]:
            del table[key]


def _enter_slot(registry: Registry, slot: str, tree: dict[str, Any], layer: Layer, laid: _Laid) -> None:
    """Before a layer's table is laid over a slot: if it changes the kind, drop what the new kind does not have.

    And what was meant for the old kind: values that a preset or problem gave together with it, which are ``bound``.
    """
    kind = layer.values[slot].get("kind")
    current = tree.get(slot)
    if "kind" not in layer.values[slot]:
        if current is None:
            raise ConfigError(f"{layer.origin_of((slot,))}: {slot} needs a kind, {_names(registry, slot)}")
        return
    component = _find(registry, slot, kind, layer.origin_of((slot, "kind")))
    if current is None or current["kind"] == kind:
        return
    before = registry.find(slot, current["kind"])
    for key in [key for key in current if key not in component.config.model_fields]:
        # A key that even the old kind does not have is a slip of the user's, and must not vanish with the old kind.
        if (slot, key) in laid.written and key not in before.config.model_fields:
            known = [name for name in component.config.model_fields if name != "kind"]
            where = origin_of(laid.origins, (slot, key))
            raise ConfigError(f"{where}: unknown key '{key}' in {slot} ('{kind}'), {nearest(key, known)}")
        del current[key]
    for key in [key for key in current if key != "kind" and (slot, key) in laid.bound]:
        del current[key]
        laid.bound.discard((slot, key))


def _validate(
    registry: Registry,
    tree: dict[str, Any],
    origins: Mapping[Location, str],
    optimizer: Component,
) -> RunConfig:
    """Config objects for the slots, then the whole."""
    for slot in ("problem", "optimizer", "likelihood", *(slot for slot in PART_SLOTS if slot in optimizer.uses)):
        if slot in tree:
            tree[slot] = _slot_config(registry, slot, tree[slot], (slot,), origins)
        elif slot == "likelihood":
            raise ConfigError(
                f"the problem '{tree['problem'].kind}' suggests no likelihood, "
                f"choose one with --likelihood NAME or --set likelihood=NAME, {_names(registry, slot)}"
            )
        else:
            raise ConfigError(f"saved configuration: {slot} is missing, the optimizer '{optimizer.name}' uses it")
    tree["sink"] = [
        _slot_config(registry, "sink", item, ("sink", index), origins)
        for index, item in enumerate(tree.get("sink", []))
    ]
    model = run_config_model(registry)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, model, origin=lambda location: origin_of(origins, location))) from error


def _slot_config(
    registry: Registry,
    slot: str,
    table: Mapping[str, Any],
    location: Location,
    origins: Mapping[Location, str],
) -> Any:
    """The config object of one component."""
    origin = origin_of(origins, (*location, "kind")) or origin_of(origins, location)
    if "kind" not in table:
        raise ConfigError(f"{origin}: {slot} needs a kind, {_names(registry, slot)}")
    model = _find(registry, slot, table["kind"], origin).config
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        message = explain(error, model, prefix=location, origin=lambda place: origin_of(origins, place))
        first = error.errors(include_url=False)[0]
        unknown = first["type"] == "extra_forbidden" and "did you mean" not in message
        where = elsewhere(str(first["loc"][-1]), slot, registry) if unknown else ""
        raise ConfigError(f"{message} ({slot} is '{table['kind']}'{where})") from error


def _component(registry: Registry, slot: str, layers: Sequence[Layer]) -> Component:
    """The component of a slot that the topmost layer with a kind names."""
    for layer in reversed(layers):
        if "kind" in layer.values.get(slot, {}):
            return _find(registry, slot, layer.values[slot]["kind"], layer.origin_of((slot, "kind")))
    raise ConfigError(f"{layers[-1].origin}: {slot} is missing, {_names(registry, slot)}")


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
    tree: dict[str, Any] = {}
    laid = _Laid()
    for layer in layers:
        if slot in layer.values:
            _lay(registry, tree, laid, layer, slot, layer.values[slot])
    return _slot_config(registry, slot, tree[slot], (slot,), laid.origins)


def _refuse_unused(slot: str, layer: Layer, optimizer: Component) -> None:
    """What the user wrote for a slot that the optimizer does not use is an error; from elsewhere it is left out."""
    if not layer.user:
        return
    used = [name for name in PART_SLOTS if name in optimizer.uses]
    raise ConfigError(
        f"{layer.origin_of((slot,))}: the optimizer '{optimizer.name}' does not use {slot} "
        f"(it uses {', '.join(used) if used else 'none of ' + ', '.join(PART_SLOTS)})"
    )


def _find(registry: Registry, slot: str, name: Any, origin: str) -> Component:
    """`Registry.find` with the origin of the name in front of the message."""
    if not isinstance(name, str):
        raise ConfigError(f"{origin}: {slot}.kind = {name!r:.60} is not a name, {_names(registry, slot)}")
    try:
        return registry.find(slot, name)
    except KfacError as error:
        raise type(error)(f"{origin}: {error}") from error


def _names(registry: Registry, slot: str) -> str:
    """All names of a slot, to end a message."""
    return f"known: {', '.join(sorted(component.name for component in registry.components(slot)))}"


def _locations(location: Location, value: Any) -> Iterable[Location]:
    """A location and everything below it, tables and lists included."""
    yield location
    items: Iterable[tuple[int | str, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _locations((*location, key), item)
