"""Pydantic's validation errors in the words of this project: what was found, where, and the nearest right key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kfacore.errors import nearest
from kfacore.schema.slots import NONE, literals_of, may_be_none

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["explain"]

Location = tuple[int | str, ...]


def explain(
    error: ValidationError,
    model: type[BaseModel],
    *,
    prefix: Location = (),
    origin: Callable[[Location], str] | None = None,
) -> str:
    """Tell the first error of a validation, and how many more there are.

    Args:
        error: What pydantic raised.
        model: The model that was validated, for the names it knows.
        prefix: Where the model sits in the configuration, for example ``("damping",)``.
        origin: Gives the source (a file, a flag) of a location, or an empty string.

    Returns:
        One or two lines such as ``"--set damping.lamda0=1: unknown key 'lamda0' in damping, did you mean 'lambda0'?"``.
    """
    details = error.errors(include_url=False)
    first = details[0]
    location = prefix + tuple(first["loc"])
    text = _sentence(first, location, model)
    source = origin(location) if origin is not None else ""
    more = f"\n(and {len(details) - 1} more of this kind)" if len(details) > 1 else ""
    return f"{source}: {text}{more}" if source else f"{text}{more}"


def _sentence(detail: ErrorDetails, location: Location, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in location)
    parent = ".".join(str(part) for part in location[:-1])
    if detail["type"] == "extra_forbidden":
        known = [name for name in _fields_at(model, detail["loc"][:-1]) if name != "kind"]
        where = f" in {parent}" if parent else ""
        hint = nearest(str(location[-1]), [*known, "kind"])
        if not hint.startswith("did"):
            hint = nearest(str(location[-1]), known) or "it takes no keys"
        return f"unknown key '{location[-1]}'{where}, {hint}"
    if detail["type"] == "missing":
        return f"'{key}' is missing and has no default"
    if detail["type"] == "literal_error":
        known = [str(name) for name in _literals_at(model, detail["loc"])]
        hint = nearest(str(detail["input"]), known) or detail["msg"]
        return f"{key} = {_show(detail['input'])} is not known, {hint}"
    message = detail["msg"]
    if detail["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    if detail["input"] is None or (isinstance(detail["input"], str) and detail["input"] == NONE):
        message = f"this key cannot be none; {message}"
    elif _takes_none(model, detail["loc"]):
        message = f"{message} (or none)"
    return f"{key} = {_show(detail['input'])}: {message}"


def _show(value: Any) -> str:
    """A value as it is found, cut where it would fill the screen."""
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the model found by following a location through nested models."""
    found = _model_at(model, location)
    return list(found.model_fields) if found is not None else []


def _takes_none(model: type[BaseModel], location: Location) -> bool:
    """Whether the field at a location may be none."""
    parent = _model_at(model, location[:-1])
    field = parent.model_fields.get(str(location[-1])) if parent is not None and location else None
    return field is not None and may_be_none(field.annotation)


def _literals_at(model: type[BaseModel], location: Location) -> tuple[Any, ...]:
    """The values a Literal field takes, and the word for None if it takes that."""
    parent = _model_at(model, location[:-1])
    field = parent.model_fields.get(str(location[-1])) if parent is not None and location else None
    if field is None:
        return ()
    return (*literals_of(field.annotation), *([NONE] if may_be_none(field.annotation) else []))


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The nested model at a location."""
    from pydantic import BaseModel

    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model
