"""Where configuration comes from: files, flags and ``--set``, each read into a layer that remembers its origin."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import ConfigError
from kfacore.lab.config.hints import key_hint
from kfacore.lab.config.run import SECTIONS, RunConfig
from kfacore.registry.compose import Layer, Location, deep_update
from kfacore.schema.table import RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = [
    "DATA_FILES",
    "UnknownKeyError",
    "file_layer",
    "finish",
    "flag_layer",
    "parse_value",
    "problem_table",
    "put",
    "read_table",
    "set_layer",
    "table_layer",
]

DATA_FILES = (".npz", ".csv")
"""How the names of files end that may stand for a problem."""


class UnknownKeyError(ConfigError):
    """A top-level key that no run has.

    Attributes:
        key: The key.
        origin: Where it was found.
    """

    def __init__(self, key: str, origin: str, registry: Registry | None = None) -> None:
        self.key, self.origin = key, origin
        super().__init__(f"{origin}: unknown key '{key}', {key_hint(key, registry)}")


def put(layer: Layer, key: str, value: Any, origin: str | None = None) -> None:
    """Add one value to a layer.

    Args:
        layer: The layer.
        key: A key, with dots to reach into tables.
        value: A name, number, list or table.
        origin: Where it comes from, if not from the layer as a whole.

    Raises:
        ConfigError: The key is unknown, or a table was expected and something else found.
    """
    where = origin or layer.origin
    path = key.split(".")
    if not all(path):
        raise ConfigError(f"{where}: '{key}' is not a key, write for example damping.lambda0")
    top = path[0]
    if top not in RunConfig.model_fields:
        raise UnknownKeyError(top, where)
    for name in reversed(path[1:]):
        value = {name: value}
    if value is None and (top in RUN_SLOTS or top == "preset"):  # a saved configuration has None for unused slots
        return
    if top in RUN_SLOTS or top in SECTIONS:
        if isinstance(layer.values.get(top), list):
            layer.values.pop(top)
        value = _table(top, value, where)
    if origin is not None:
        for location in _leaves((top,), value):
            layer.origins[location] = origin
            layer.origins[(top,)] = origin
    deep_update(layer.values, {top: value})


def finish(layer: Layer) -> Layer:
    """The layer, complete: a single table of a slot that takes several, a sink, is a list of one."""
    for slot in RUN_SLOTS:
        if SLOTS[slot].many and isinstance(layer.values.get(slot), dict):
            layer.values[slot] = [layer.values[slot]]
    return layer


def table_layer(values: Mapping[str, Any], origin: str, *, user: bool) -> Layer:
    """A layer from a table as it is written in a file.

    Raises:
        ConfigError: A key is unknown or has the wrong form.
    """
    layer = Layer(origin, user)
    for key, value in values.items():
        if "." in key:
            raise ConfigError(f'{origin}: the quoted key "{key}" is not known, write it without quotes')
        put(layer, key, value)
    return finish(layer)


def file_layer(path: str | PathLike[str]) -> Layer:
    """Read a TOML file, or the ``config.json`` of a run.

    Raises:
        ConfigError: The file is missing, unreadable or malformed, or a key is unknown.
    """
    return table_layer(read_table(path), str(path), user=True)


def read_table(path: str | PathLike[str]) -> dict[str, Any]:
    """The table in a TOML or JSON file.

    Raises:
        ConfigError: The file is missing, unreadable or malformed.
    """
    origin = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file '{origin}'") from None
    except OSError as error:
        raise ConfigError(f"the configuration file '{origin}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin} is not a text file in UTF-8, found byte {error.start}: {error.reason}") from error
    try:
        values = json.loads(text) if origin.endswith(".json") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        form = "JSON" if origin.endswith(".json") else "TOML"
        raise ConfigError(f"{origin} is not valid {form}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds a {type(values).__name__}, not a table of keys")
    return values


def flag_layer(flags: Mapping[str, Any]) -> Layer:
    """Named flags, by the (dotted) key that each stands for; those that are None were not given.

    Raises:
        ConfigError: A key is unknown.
    """
    layer = Layer("flags", user=True)
    for key, value in flags.items():
        if value is not None:
            put(layer, key, value, f"--{key.rpartition('.')[2].replace('_', '-')}")
    return finish(layer)


def set_layer(sets: Sequence[str]) -> Layer:
    """Assignments ``KEY=VALUE`` with dotted keys; the value is TOML, a bare word is a string.

    Raises:
        ConfigError: There is no ``=``, the key is unknown, or the value is neither TOML nor a bare word.
    """
    layer = Layer("--set", user=True)
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        origin = f"--set {assignment}"
        if not equals:
            raise ConfigError(f"{origin}: needs the form KEY=VALUE, for example --set damping.lambda0=1.0")
        put(layer, key.strip(), parse_value(text.strip(), origin), origin)
    return finish(layer)


def parse_value(text: str, origin: str) -> Any:
    """The value of an assignment: TOML, or a bare word.

    Args:
        text: What stands behind the ``=``.
        origin: The whole assignment, for messages.

    Raises:
        ConfigError: It is neither.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if not text or text[0] in "\"'[{" or any(character in text for character in "\n\r"):
            raise ConfigError(f"{origin}: the value is not valid TOML: {error}") from error
        return text
    if list(parsed) != ["value"]:
        raise ConfigError(f"{origin}: one value is needed, found several lines")
    return parsed["value"]


def problem_table(word: str) -> dict[str, Any]:
    """What a problem's one word stands for: a file of arrays, a function ``module:function``, or a name.

    A file needs a name that ends in .npz or .csv; a function may stand in a file too, ``folder/file.py:function``.
    """
    if word.lower().endswith(DATA_FILES):
        return {"kind": "npz", "file": word}
    if ":" in word:
        return {"kind": "python", "target": word}
    return {"kind": word}


def _table(top: str, value: Any, where: str) -> Any:
    """The table (for ``sink`` also a list of tables) of a slot or section."""
    if isinstance(value, Mapping):
        return dict(value)
    if top == "problem" and isinstance(value, str):
        return problem_table(value)
    if top in RUN_SLOTS and isinstance(value, str):
        return {"kind": value}
    if top in RUN_SLOTS and SLOTS[top].many and isinstance(value, list | tuple):
        return [_table(top, item, where) for item in value]
    if top in RUN_SLOTS:
        raise ConfigError(f"{where}: {top} = {value!r:.60}: needs a name or a table with kind")
    known = ", ".join(SECTIONS[top].model_fields)
    raise ConfigError(f"{where}: {top} = {value!r:.60}: needs a table with the keys {known}")


def _leaves(location: Location, value: Any) -> Iterable[Location]:
    """Locations of everything in a table that is no table."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves((*location, key), item)
    else:
        yield location
