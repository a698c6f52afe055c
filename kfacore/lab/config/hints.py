"""Where a key is that the user wrote in the wrong place or with a slip: the end of messages about unknown keys."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from kfacore.errors import nearest
from kfacore.lab.config.run import SECTIONS, RunConfig
from kfacore.schema.table import RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kfacore.registry import Registry

__all__ = ["elsewhere", "key_hint"]

_CUTOFF = 0.6
"""How alike two words must be. Every key of every component is a candidate, so chance finds something close."""


def key_hint(key: str, registry: Registry | None = None) -> str:
    """The hint that ends a message about an unknown top-level key.

    Args:
        key: What the user wrote.
        registry: Knows the keys of the components; without it those that all components of a slot have are known.

    Returns:
        ``"did you mean 'damping.lambda0'?"``, with the names of the components in brackets where only some of the
        slot's have the key; all top-level keys if nothing is near.
    """
    homes = _homes(registry)
    if key in homes:
        return f"did you mean {' or '.join(homes[key])}?"
    top = list(RunConfig.model_fields)
    close = get_close_matches(key, [*top, *homes], n=1, cutoff=_CUTOFF)
    if close and close[0] not in top:
        return f"did you mean {' or '.join(homes[close[0]])}?"
    return nearest(key, top)


def elsewhere(key: str, slot: str, registry: Registry) -> str:
    """Where else there is a key that a component does not have, ``"; there is 'damping.lambda0'"``, or nothing.

    Args:
        key: What the user wrote.
        slot: In which slot.
        registry: Knows the keys of the components.
    """
    places = [place for place in _homes(registry).get(key, ()) if not place.startswith(f"'{slot}.")]
    return f"; there is {' and '.join(places)}" if places else ""


def _homes(registry: Registry | None) -> dict[str, list[str]]:
    """The places of every key that lies in a table, by its name."""
    homes: dict[str, list[str]] = {}
    for table, model in SECTIONS.items():
        for key in _keys(model):
            homes.setdefault(key, []).append(f"'{table}.{key}'")
    for slot in RUN_SLOTS:
        components = registry.components(slot) if registry is not None else ()
        models = {component.name: component.config for component in components} or {"": SLOTS[slot].config}
        for key in dict.fromkeys(key for model in models.values() for key in _keys(model)):
            names = [name for name, model in models.items() if key in model.model_fields]
            only = f" ({', '.join(names)})" if len(names) < len(models) else ""
            homes.setdefault(key, []).append(f"'{slot}.{key}'{only}")
    return homes


def _keys(model: type[BaseModel]) -> Iterable[str]:
    return (key for key in model.model_fields if key != "kind")
