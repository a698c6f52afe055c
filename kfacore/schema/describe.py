"""The keys of a config model in words: type, range, default and help, for ``kfac show``."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

__all__ = ["KeyHelp", "describe"]

_RELATIONS: tuple[tuple[type[Any], str, str], ...] = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "<="),
)


@dataclass(frozen=True)
class KeyHelp:
    """One key.

    Attributes:
        key: Its name, with dots for keys of nested tables.
        type: What it takes, for example ``float > 0, <= 1``.
        default: The default in JSON types.
        help: What it does.
    """

    key: str
    type: str
    default: Any
    help: str


def describe(model: type[BaseModel], prefix: str = "") -> list[KeyHelp]:
    """The keys of a config model without ``kind``, bases first.

    Args:
        model: A model that can be built from its defaults.
        prefix: Put in front of every key.
    """
    defaults = model.model_validate({}).model_dump(mode="json")
    keys: list[KeyHelp] = []
    for name, field in model.model_fields.items():
        if name == "kind" and not prefix:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += describe(field.annotation, f"{prefix}{name}.")
            continue
        text = _with_range(_type_text(field.annotation), field.metadata)
        keys.append(KeyHelp(f"{prefix}{name}", text, defaults[name], " ".join((field.description or "").split())))
    return keys


def _type_text(annotation: Any) -> str:
    """An annotation as a user would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "none"
    if origin is Annotated:
        return _with_range(_type_text(arguments[0]), _constraints(arguments[1:]))
    if origin is Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"list of {_type_text(arguments[0])}"
    if origin is not None:
        inner = ", ".join(_type_text(argument) for argument in arguments)
        return f"{_type_text(origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    """Constraints out of ``Field(...)`` objects."""
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item]) if inner]


def _with_range(text: str, metadata: Iterable[Any]) -> str:
    """A type with the range of its values."""
    bounds = [
        f"{sign} {getattr(item, attribute)!r}"
        for item in metadata
        for kind, attribute, sign in _RELATIONS
        if isinstance(item, kind) and getattr(item, attribute) is not PydanticUndefined
    ]
    return f"{text} {', '.join(bounds)}" if bounds else text
