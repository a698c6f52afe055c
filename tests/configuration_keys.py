"""The tables of keys in docs/reference, from the config models; ``python tests/configuration_keys.py`` writes them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import create_model

from kfacore.lab.config.run import SECTIONS, RunConfig
from kfacore.plugin import SLOTS, Component
from kfacore.registry import get_registry
from kfacore.schema.describe import KeyHelp, describe
from kfacore.schema.slots import Model
from kfacore.schema.table import SLOT_DEFAULTS

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"

ARCHITECTURE = REFERENCE.parent / "explanation" / "architecture.md"

DOCUMENTS = [REFERENCE / "keys.md", REFERENCE / "component-keys.md", ARCHITECTURE]
"""Pages with keys of a run, with those of the components, and with the slots."""

RUN, COMPONENTS, ROLES = "## The keys", "## By slot", "## The slots"

NOTES = {
    "sink": "A run may have several, each a `[[sink]]` table in a file. Plots, reports and studies need `jsonl`.",
    "layer": "Nobody chooses a layer type: every registered one is asked, and the first that reads a module does.",
    "executor": "The executor belongs to a study: its keys stand in the study's file, under `[executor]`.",
}


def run_table() -> str:
    """The keys of a run: slots, single keys, sections."""
    plain = {name: field for name, field in RunConfig.model_fields.items() if name not in {*SLOTS, *SECTIONS}}
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in plain.items()}
    keys = {key.key: key for key in describe(create_model("Plain", __base__=Model, **fields))}
    rows = []
    for name, field in RunConfig.model_fields.items():
        if name in SLOTS:
            kind = SLOT_DEFAULTS.get(name)
            default = f"`{kind}`" if kind else "the problem's"
            text = (field.description or "").removesuffix(".")
            rows.append([f"`{name}`", "list of slots" if SLOTS[name].many else "slot", default, text])
        elif name in SECTIONS:
            rows += [_cells(key) for key in describe(SECTIONS[name], f"{name}.")]
        else:
            rows.append(_cells(keys[name]))
    return _table(["key", "type", "default", "meaning"], rows)


def component_tables() -> str:
    """The keys of kfacore's own components, by slot; a key that several share has one row."""
    return "\n".join(part for slot in SLOTS for part in _slot(slot)).rstrip("\n") + "\n"


def slot_table() -> str:
    """Every slot, with what is built in."""
    rows = []
    for slot in SLOTS.values():
        default = f"`{slot.default}`" if slot.default else "every one" if slot.used_by == "network" else "the problem's"
        names = ", ".join(component.name for component in _own(slot.name))
        rows.append([f"`{slot.name}`", f"`{slot.role}`", slot.answers, default, names])
    return _table(["slot", "role", "answers", "default", "built in"], rows)


def _own(slot: str) -> list[Component]:
    registry = get_registry()
    return [part for part in registry.components(slot) if registry.origin(part).distribution == "kfacore"]


def _slot(slot: str) -> Iterator[str]:
    own = _own(slot)
    yield f"### {slot}\n"
    said = f"Components: {', '.join(f'`{component.name}`' for component in own)}. {NOTES.get(slot, '')}".rstrip()
    yield f"{textwrap.fill(said, 120, break_long_words=False, break_on_hyphens=False)}\n"
    rows = list(_rows(slot, own))
    if rows:
        yield _table(["key", "of", "type", "default", "meaning"], rows)


def _rows(slot: str, components: Iterable[Component]) -> Iterator[list[str]]:
    owners: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for component in components:
        for key in describe(component.config):
            name, kind, default, text = _cells(key, f"{slot}.")
            owners.setdefault((name, kind, text), {}).setdefault(default, []).append(f"`{component.name}`")
    for (key_name, kind, text), defaults in owners.items():
        names = ", ".join(name for some in defaults.values() for name in some)
        said = "; ".join(f"{default} of {', '.join(some)}" for default, some in defaults.items())
        yield [key_name, names, kind, said if len(defaults) > 1 else next(iter(defaults)), text]


def _cells(key: KeyHelp, prefix: str = "") -> list[str]:
    kind = re.sub(r"'([^']*)'", r"\1", key.type).replace(" | ", " or ").replace(str(2**63), "2^63")
    default = "none" if key.default is None else f"`{json.dumps(key.default)}`"
    text = key.help if key.help.endswith("...") else key.help.removesuffix(".")
    return [f"`{prefix}{key.key}`", kind, default, text.replace("``", "`").replace("|", "\\|")]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def written(text: str) -> str:
    """A document with the tables under these headings made anew, where it has one of them."""
    if not any(f"\n{heading}\n" in text for heading in (RUN, COMPONENTS, ROLES)):
        raise ValueError(f"the document has no heading '{RUN}', '{COMPONENTS}' or '{ROLES}'")
    for heading, table in ((RUN, run_table), (COMPONENTS, component_tables), (ROLES, slot_table)):
        before, found, rest = text.partition(f"\n{heading}\n")
        if not found:
            continue
        after = re.split(r"^(?=## )", rest, maxsplit=1, flags=re.MULTILINE)[1:]
        text = f"{before}\n{heading}\n\n{table()}" + "".join(f"\n{part}" for part in after)
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
