"""What a manifest must satisfy before its component is offered; the target itself is not imported here."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kfacore.errors import nearest
from kfacore.plugin import SLOTS, Component, kind_of
from kfacore.schema.explain import explain
from kfacore.schema.slots import SlotConfig

__all__ = ["check_component"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_component(component: Component) -> str | None:
    """Check one manifest.

    Args:
        component: What a plug-in returned; its fields may hold anything, for nothing checked them before.

    Returns:
        What is wrong and what to do, or None.
    """
    slot: Any = component.slot
    if not isinstance(slot, str) or slot not in SLOTS:
        return f"unknown slot {slot!r}, {nearest(str(slot), SLOTS)}"
    name: Any = component.name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"the name {name!r} is not made of letters, digits, '-', '_', '+' and '.'"
    target: Any = component.target
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        return f"the target {target!r} is not of the form 'module:Class'"
    summary: Any = component.summary
    if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
        return f"the summary {summary!r} is not one line of text"
    return _check_uses(component) or _check_config(component)


def _check_uses(component: Component) -> str | None:
    """`uses` names slots, and only optimizers have it."""
    uses: Any = component.uses
    if not isinstance(uses, frozenset | set | tuple | list):
        return f"`uses` is {uses!r}, not a frozenset of slots"
    for slot in uses:
        if slot not in SLOTS:
            return f"`uses` names the unknown slot {slot!r}, {nearest(str(slot), SLOTS)}"
    if uses and component.slot != "optimizer":
        return "`uses` is for optimizers only"
    return None


def _check_config(component: Component) -> str | None:
    """The config model fits the slot, carries the component's name, and works with its defaults alone."""
    config: Any = component.config
    base = SLOTS[component.slot].config
    if not isinstance(config, type) or not issubclass(config, BaseModel):
        return f"the config {config!r} is not a pydantic model, derive it from kfacore.plugin.{base.__name__}"
    label = config.__name__
    if not issubclass(config, base):
        return f"{label} does not derive from kfacore.plugin.{base.__name__}"
    return _check_model(config, component.name)


@lru_cache(maxsize=512)  # who looks for plug-ins again, as tests do, finds the same classes
def _check_model(config: type[SlotConfig], name: str) -> str | None:
    label = config.__name__
    if kind_of(config) != name:
        return f"the default of {label}.kind is {kind_of(config)!r}, not the component's name {name!r}"
    annotation = config.model_fields["kind"].annotation
    if get_origin(annotation) is not Literal or get_args(annotation) != (name,):
        return f"{label}.kind is not annotated Literal[{name!r}]"
    if config.model_config.get("extra") != "forbid" or not config.model_config.get("frozen"):
        return f"{label} must keep extra='forbid' and frozen=True of its base"
    if not isinstance(getattr(config, "run_defaults", {}), dict):
        return f"{label}.run_defaults is not a dict"
    try:
        # A round trip through JSON, because the resolved configuration is saved with every run and read again.
        default = config.model_validate({})
        if config.model_validate(default.model_dump(mode="json")) != default:
            return f"{label} does not survive being saved as JSON and read again"
        config.model_json_schema()
    except ValidationError as error:
        return f"{label} cannot be built from its defaults: {explain(error, config)}"
    except Exception as error:  # a third party's validators and types may raise anything
        return f"{label} cannot be built, saved and described: {type(error).__name__}: {error}"
    return None
