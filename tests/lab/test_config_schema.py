"""The JSON Schema of files: it takes what files may hold, and an editor can find every key in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kfacore.lab.config.run import RunConfig
from kfacore.lab.config.schema import run_config_schema
from kfacore.registry import get_registry
from kfacore.schema.presets import PRESETS
from kfacore.schema.table import RUN_SLOTS


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return run_config_schema(get_registry())


def definition(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a reference points to."""
    return schema["$defs"][part["$ref"].removeprefix("#/$defs/")]


def test_every_key_is_there_and_none_is_required(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert "required" not in schema
    assert schema["additionalProperties"] is False
    assert schema["properties"]["preset"]["enum"] == sorted(PRESETS)
    json.dumps(schema)


@pytest.mark.parametrize("slot", RUN_SLOTS)
def test_a_slot_is_a_name_or_a_table(schema: dict[str, Any], slot: str) -> None:
    components = get_registry().components(slot)
    names, *tables = schema["properties"][slot]["anyOf"]
    assert names == {"type": "string", "enum": sorted(component.name for component in components)}
    if slot == "problem":
        *tables, words = tables
        assert [bool(re.search(words["pattern"], word)) for word in ("a.npz", "a.csv", "m:f", "curves")] == [
            True, True, True, False,
        ]  # fmt: skip
    if slot == "sink":
        *tables, several = tables
        assert several == {"type": "array", "items": {"anyOf": [names, *tables]}}
    kinds = {definition(schema, table)["properties"]["kind"]["const"]: definition(schema, table) for table in tables}
    assert set(kinds) == {component.name for component in components}
    for component in components:
        assert set(kinds[component.name]["properties"]) == set(component.config.model_fields)
        assert "required" not in kinds[component.name]  # kind may come from a lower layer
    assert schema["properties"][slot]["description"] == RunConfig.model_fields[slot].description


def test_every_null_has_its_word(schema: dict[str, Any]) -> None:
    assert {"const": "none"} in schema["properties"]["threads"]["anyOf"]
    damping = schema["$defs"]["LevenbergMarquardtConfig"]["properties"]
    assert {"const": "none"} in damping["gamma_max"]["anyOf"]
    assert "anyOf" not in damping["lambda_every"]
    text = json.dumps(schema)
    assert text.count('{"type": "null"}') == text.count('{"const": "none"}') > 5
