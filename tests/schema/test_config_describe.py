"""The words for keys, types and ranges, and for validation errors."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from kfacore.schema.describe import KeyHelp, describe
from kfacore.schema.explain import explain
from kfacore.schema.slots import ApproxConfig, Fraction, Model


class Inner(Model):
    width: Annotated[int, Field(ge=1)] = 3
    """Width of
    a unit."""
    shape: Literal["round", "square"] = "round"
    """Shape."""


class Outer(ApproxConfig):
    kind: Literal["outer"] = "outer"
    share: Fraction = 0.5
    """Share."""
    limit: Annotated[float, Field(gt=0.0)] | None = None
    """Limit."""
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2)
    """Sizes."""
    names: dict[str, float] = Field(default_factory=dict)
    """Names."""
    inner: Inner = Inner()
    """Inner."""

    @field_validator("names")
    @classmethod
    def _check(cls, value: dict[str, float]) -> dict[str, float]:
        if "bad" in value:
            raise ValueError("Bad is not a name")
        return value


def test_describe() -> None:
    own = [key for key in describe(Outer) if key.key not in ApproxConfig.model_fields]
    assert own == [
        KeyHelp("share", "float > 0.0, <= 1.0", 0.5, "Share."),
        KeyHelp("limit", "float > 0.0 | none", None, "Limit."),
        KeyHelp("sizes", "list of int >= 1", [1, 2], "Sizes."),
        KeyHelp("names", "dict[str, float]", {}, "Names."),
        KeyHelp("inner.width", "int >= 1", 3, "Width of a unit."),
        KeyHelp("inner.shape", "'round' | 'square'", "round", "Shape."),
    ]
    assert describe(Outer)[0].key == "refresh_every"  # the base's come first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shre": 1}, "unknown key 'shre' in approx, did you mean 'share'?"),
        ({"inner": {"widht": 1}}, "unknown key 'widht' in approx.inner, did you mean 'width'?"),
        ({"inner": {"shape": "rond"}}, "approx.inner.shape = 'rond' is not known, did you mean 'round'?"),
        ({"inner": {"shape": 3}}, "approx.inner.shape = 3 is not known, known: round, square"),
        ({"share": 2}, "approx.share = 2: input should be less than or equal to 1"),
        ({"sizes": [1, 0]}, "approx.sizes.1 = 0: input should be greater than or equal to 1"),
        ({"names": {"bad": 1}}, "approx.names = {'bad': 1}: bad is not a name"),
        ({"inner": 3}, "approx.inner = 3: input should be a valid dictionary or instance of Inner"),
        ({"limit": "x" * 99}, f"approx.limit = '{'x' * 56}...: input should be a valid number, unable to parse"),
        (
            {"limit": "many"},
            "approx.limit = 'many': input should be a valid number, unable to parse string as a number (or none)",
        ),
        ({"share": "none"}, "approx.share = 'none': this key cannot be none; input should be a valid number"),
        ({"share": None}, "approx.share = None: this key cannot be none; input should be a valid number"),
    ],
)
def test_explain(values: dict, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    assert explain(caught.value, Outer, prefix=("approx",)).startswith(message)


def test_explain_names_the_source_and_counts_the_rest() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"share": 0, "refresh_every": 0})
    text = explain(caught.value, Outer, origin=lambda location: f"from {location[0]}")
    first, more = text.splitlines()
    assert first == "from refresh_every: refresh_every = 0: input should be greater than or equal to 1"
    assert more == "(and 1 more of this kind)"


class Words(Model):
    limit: Annotated[float, Field(gt=0.0)] | None = 1.0
    task: Literal["fit", "none"] | None = None
    name: str = "x"


def test_the_word_none() -> None:
    """None where a key may be None; itself where it is one of the values, or a text."""
    words = Words.model_validate({"limit": "none", "task": "none", "name": "none"})
    assert (words.limit, words.task, words.name) == (None, "none", "none")
    assert Words.model_validate({"limit": 0.5, "task": None}).model_dump() == {"limit": 0.5, "task": None, "name": "x"}
    assert Words.model_validate(words) == words


def test_explain_missing() -> None:
    class Needy(Model):
        path: str

    with pytest.raises(ValidationError) as caught:
        Needy.model_validate({})
    assert explain(caught.value, Needy) == "'path' is missing and has no default"
