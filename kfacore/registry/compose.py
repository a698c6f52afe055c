"""The composer: layers of values laid over each other, and the config objects that they mean together.

One code for Python, files, flags and ``--set``. Precedence is the order of the layers. A layer may leave the kind of a
slot to those below it; one that changes the kind drops what was meant for the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kfacore.errors import ConfigError, KfacError, nearest
from kfacore.plugin import Component
from kfacore.registry.lookup import Registry
from kfacore.schema.explain import explain
from kfacore.schema.presets import PRESETS
from kfacore.schema.slots import SlotConfig
from kfacore.schema.table import SLOT_DEFAULTS, SLOTS

__all__ = [
    "Composer",
    "Layer",
    "compose_slots",
    "deep_update",
    "find_component",
    "known_names",
    "origin_of",
    "preset_layer",
    "preset_values",
]

Location = tuple[int | str, ...]

_PRESET = "preset"
"""How the origin of a preset's values begins."""


@dataclass
class Layer:
    """Values of one rank of precedence.

    Attributes:
        origin: Where the values come from, for messages; empty where the caller's own line shows it.
        user: Whether the user wrote them, so that nothing of them may be ignored.
        values: The values by top-level key; slots and sections are tables, ``sink`` is a list of tables.
        origins: Origins of single keys, where the layer has several (one for each flag).
    """

    origin: str
    user: bool
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Location, str] = field(default_factory=dict)

    def origin_of(self, location: Location) -> str:
        """The origin of the longest known part of a location."""
        return origin_of(self.origins, location) or self.origin


def origin_of(origins: Mapping[Location, str], location: Location) -> str:
    """The origin of the longest part of a location that has one, or an empty string."""
    for length in range(len(location), 0, -1):
        if location[:length] in origins:
            return origins[location[:length]]
    return ""


def deep_update(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Lay values over a table: tables merge, everything else replaces."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            deep_update(into[key], value)
        else:
            into[key] = _copy(value)


def preset_values(name: object, where: str = "") -> dict[str, Any]:
    """The values of a preset.

    Raises:
        ConfigError: There is none of this name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{_at(where)}unknown preset '{name}', {nearest(str(name), PRESETS)}")
    return PRESETS[name]


def preset_layer(name: object, where: str = "") -> Layer:
    """A preset as a layer.

    Raises:
        ConfigError: There is none of this name.
    """
    return Layer(f"{_PRESET} '{name}'", user=False, values=_copy(preset_values(name, where)))


class Composer:
    """Values of layers, laid over each other one by one.

    Args:
        registry: Where the components come from.
        elsewhere: Where else there is a key that a slot's component does not have, for the end of a message.

    Attributes:
        tree: The values so far.
        origins: Where the value of each location comes from.
    """

    def __init__(self, registry: Registry, elsewhere: Callable[[str, str], str] | None = None) -> None:
        self.registry = registry
        self.tree: dict[str, Any] = {}
        self.origins: dict[Location, str] = {}
        self._elsewhere = elsewhere
        self._written: set[Location] = set()  # whose value is the user's
        self._bound: set[Location] = set()  # given together with the kind, by a preset or a problem

    def lay(self, layer: Layer, key: str) -> None:
        """Lay one value of a layer over those that are there.

        Raises:
            ConfigError: A slot's table has no kind and none is below it, or a key would vanish with the old kind.
        """
        value = layer.values[key]
        if key in SLOTS and not SLOTS[key].many:
            self._enter(key, layer)
            chooses = not layer.user and "kind" in value
            for name in value:
                (self._bound.add if chooses else self._bound.discard)((key, name))
        if isinstance(value, list):  # replaces the list of lower layers, whose origins must not answer for it
            for location in [known for known in self.origins if known[0] == key]:
                del self.origins[location]
        for location in _locations((key,), value):
            self.origins[location] = layer.origin_of(location)
            (self._written.add if layer.user else self._written.discard)(location)
        deep_update(self.tree, {key: value})

    def drop_foreign(self, slots: Iterable[str]) -> None:
        """A preset may have keys for several kinds of a slot: leave out those that the chosen kind does not have."""
        for slot in slots:
            table = self.tree.get(slot, {})
            fields = self.registry.find(slot, table["kind"]).config.model_fields if table else {}
            foreign = [key for key in table if key not in fields]
            for key in [key for key in foreign if origin_of(self.origins, (slot, key)).startswith(_PRESET)]:
                del table[key]

    def config(self, slot: str, table: Mapping[str, Any], location: Location) -> SlotConfig:
        """The config object of one component.

        Raises:
            ConfigError: A key, name or value is wrong.
            PluginError: The component's plug-in cannot be used.
        """
        origin = origin_of(self.origins, (*location, "kind")) or origin_of(self.origins, location)
        if "kind" not in table:
            raise ConfigError(f"{_at(origin)}{slot} needs a kind, {known_names(self.registry, slot)}")
        model = find_component(self.registry, slot, table["kind"], origin).config
        try:
            return model.model_validate(dict(table))
        except ValidationError as error:
            message = explain(error, model, prefix=location, origin=lambda place: origin_of(self.origins, place))
            first = error.errors(include_url=False)[0]
            unknown = first["type"] == "extra_forbidden" and "did you mean" not in message
            where = self._elsewhere(str(first["loc"][-1]), slot) if unknown and self._elsewhere else ""
            raise ConfigError(f"{message} ({slot} is '{table['kind']}'{where})") from error

    def _enter(self, slot: str, layer: Layer) -> None:
        """Before a layer's table is laid over a slot: if it changes the kind, drop what the new kind does not have.

        And what was meant for the old kind: values that a preset or problem gave together with it, which are bound.
        """
        kind = layer.values[slot].get("kind")
        current = self.tree.get(slot)
        if "kind" not in layer.values[slot]:
            if current is None:
                raise ConfigError(
                    f"{_at(layer.origin_of((slot,)))}{slot} needs a kind, {known_names(self.registry, slot)}"
                )
            return
        component = find_component(self.registry, slot, kind, layer.origin_of((slot, "kind")))
        if current is None or current["kind"] == kind:
            return
        before = self.registry.find(slot, current["kind"])
        for key in [key for key in current if key not in component.config.model_fields]:
            # A key that even the old kind does not have is a slip of the user's, and must not vanish with the old kind.
            if (slot, key) in self._written and key not in before.config.model_fields:
                known = [name for name in component.config.model_fields if name != "kind"]
                where = origin_of(self.origins, (slot, key))
                raise ConfigError(f"{_at(where)}unknown key '{key}' in {slot} ('{kind}'), {nearest(key, known)}")
            del current[key]
        for key in [key for key in current if key != "kind" and (slot, key) in self._bound]:
            del current[key]
            self._bound.discard((slot, key))


def compose_slots(registry: Registry, slots: Sequence[str], preset: Layer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of an optimizer that is made in Python: defaults < preset < what the caller gave.

    Args:
        registry: Where the components come from.
        slots: The slots.
        preset: What lies below the caller's values.
        given: By slot: a name, a table, or anything else, which is taken as it is; None is not given.

    Returns:
        By slot, a config object, or what was taken as it is.

    Raises:
        ConfigError: A key, name or value is wrong.
        PluginError: A component that was named belongs to a plug-in that cannot be used.
    """
    chosen = {slot: given[slot] for slot in slots if given.get(slot) is not None}
    tables = {slot: {"kind": value} if isinstance(value, str) else value for slot, value in chosen.items()}
    written = {slot: dict(table) for slot, table in tables.items() if isinstance(table, Mapping)}
    defaults = Layer("", user=False, values={slot: {"kind": SLOT_DEFAULTS[slot]} for slot in slots})
    open_slots = [slot for slot in slots if slot in written or slot not in chosen]
    composer = Composer(registry)
    for layer in (defaults, preset, Layer("", user=True, values=written)):
        for slot in open_slots:
            if slot in layer.values:
                composer.lay(layer, slot)
    composer.drop_foreign(open_slots)
    return {slot: composer.config(slot, composer.tree[slot], (slot,)) for slot in open_slots} | {
        slot: value for slot, value in chosen.items() if slot not in written
    }


def find_component(registry: Registry, slot: str, name: Any, origin: str) -> Component:
    """`Registry.find` with the origin of the name in front of the message.

    Raises:
        ConfigError: It is no name, or none that is known.
        PluginError: It belongs to a plug-in that cannot be used.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{_at(origin)}{slot}.kind = {name!r:.60} is not a name, {known_names(registry, slot)}")
    try:
        return registry.find(slot, name)
    except KfacError as error:
        raise type(error)(f"{_at(origin)}{error}") from error


def known_names(registry: Registry, slot: str) -> str:
    """All names of a slot, to end a message."""
    return f"known: {', '.join(sorted(component.name for component in registry.components(slot)))}"


def _at(origin: str) -> str:
    """The beginning of a message."""
    return f"{origin}: " if origin else ""


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


def _copy(value: Any) -> Any:
    """A copy of tables and lists, so that layers never share them with presets."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value
