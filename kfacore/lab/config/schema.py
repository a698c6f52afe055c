"""JSON Schema of configuration files, for editors that complete and check TOML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfacore.lab.config.run import run_config_model
from kfacore.schema.presets import PRESETS
from kfacore.schema.slots import NONE
from kfacore.schema.table import RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["run_config_schema"]


def run_config_schema(registry: Registry) -> dict[str, Any]:
    """The schema of a file given to ``kfac train -c``.

    It differs from the schema of `RunConfig` as files differ from resolved configurations: nothing is required, a slot
    may be a bare name, a table may leave its ``kind`` to a lower layer, and the word "none" stands for null.

    Args:
        registry: Where the components come from.
    """
    schema = run_config_model(registry).model_json_schema()
    schema.pop("required", None)
    properties = schema["properties"]
    for slot in RUN_SLOTS:
        names = sorted(component.name for component in registry.components(slot))
        entry = properties[slot]
        tables = _tables(entry.pop("items") if SLOTS[slot].many else entry)
        one: list[dict[str, Any]] = [{"type": "string", "enum": names}, *tables]
        if slot == "problem":  # a file of arrays, or a function
            one.append({"type": "string", "pattern": r"\.(npz|csv)$|^.+:.+$"})
        # Not oneOf: a table without kind fits several components.
        anyof = [*one, {"type": "array", "items": {"anyOf": one}}] if SLOTS[slot].many else one
        properties[slot] = {"description": entry.get("description", ""), "anyOf": anyof}
    properties["preset"]["enum"] = sorted(PRESETS)
    _add_none(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "kfac run configuration"}


def _tables(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """References to the tables of a slot, out of pydantic's unions."""
    if "$ref" in entry:
        return [{"$ref": entry["$ref"]}]
    return [table for choice in ("oneOf", "anyOf") for item in entry.get(choice, ()) for table in _tables(item)]


def _add_none(part: Any) -> None:
    """Beside every null, which TOML cannot write, the word for it."""
    if isinstance(part, dict):
        choices = part.get("anyOf")
        if isinstance(choices, list) and {"type": "null"} in choices:
            choices.append({"const": NONE})
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _add_none(inner)
