"""The study file: what varies, over which seeds and problems, and for how long. Imports no torch.

Source of the words: an ablation changes one thing at a time from the base; a grid takes all combinations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from kfacore.errors import ConfigError, nearest
from kfacore.lab.config.run import Count, RunConfig
from kfacore.lab.config.schema import run_config_schema
from kfacore.lab.config.sources import parse_value, read_table
from kfacore.registry.compose import deep_update
from kfacore.schema.explain import explain
from kfacore.schema.slots import Model
from kfacore.schema.table import SLOT_DEFAULTS

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["StudyBudget", "StudyConfig", "TargetConfig", "TuneConfig", "VariantConfig", "read_study", "study_schema"]

Measure = Literal[
    "train_error",
    "train_loss",
    "test_error",
    "test_loss",
    "averaged_train_error",
    "averaged_train_loss",
    "averaged_test_error",
    "averaged_test_loss",
]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=80)]

STUDY_KEYS = {
    "seed": "seeds = [...]",
    "threads": "threads = N",
    "processes": "processes = N",
    "steps": "[budget] steps = N",
    "budget": "[budget]",
}
"""Keys of a run that belong to a study as a whole, and what to write instead."""


class TargetConfig(Model):
    """What a run is to reach, for time-to-target."""

    measure: Measure = "train_error"
    """Number of the evaluation events that must reach the target."""
    value: Annotated[float, Field(gt=0.0)]
    """The target is reached at the first evaluation with this value or less."""


class StudyBudget(Model):
    """How long each run lasts; it ends at the first limit. If none is given, a run's own steps decide."""

    steps: Count | None = None
    """Steps."""
    cases: Count | None = None
    """Training cases, the sum of the mini-batches."""
    seconds: Annotated[float, Field(gt=0.0)] | None = None
    """Training seconds; evaluation and checkpoints do not count."""


class TuneConfig(Model):
    """Tuning of a variant before its runs: short runs over a grid, and the best one's values are taken."""

    axes: dict[str, Any]
    """Lists of values by key; all combinations are tried, for each problem."""
    budget: StudyBudget = StudyBudget()
    """How long each of the tuning runs lasts; the study's budget if left out."""
    measure: Measure = "train_error"
    """Number of the last evaluation that decides."""
    seed: Seed | None = None
    """Seed of the tuning runs; by default the study's first."""


class VariantConfig(Model):
    """A variant with a name: keys of a run's configuration beside it say what is changed in the base."""

    model_config = ConfigDict(extra="allow")

    name: Name
    """What the variant is called in tables and figures."""
    tune: TuneConfig | None = None
    """Short runs that choose values of this variant first."""

    @property
    def overrides(self) -> dict[str, Any]:
        """What the variant changes in the base."""
        return dict(self.model_extra or {})


class StudyConfig(Model):
    """A study file. `read_study` makes one."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "study"
    """Name of the study; by default the file's."""
    description: str = ""
    """What the study is about, for the report."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Configuration that every variant starts from, as in a file for kfac train."""
    problems: tuple[str | dict[str, Any], ...] = ()
    """Problems, each a name or a table, that every variant is run on; by default that of the base."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """Lists of values by key; all combinations are variants."""
    one_at_a_time: dict[str, Any] = Field(default_factory=dict)
    """Lists of values by key; each value is a variant that changes this key alone, and the base is the first one."""
    variants: tuple[VariantConfig, ...] = ()
    """Variants with names of their own, besides axes or one_at_a_time."""
    reference: str | None = None
    """Name of the variant that the others are compared with; by default the first one."""
    seeds: Annotated[int, Field(strict=True, ge=1, le=10_000)] | tuple[Seed, ...] = (0,)
    """Seeds, or a number n for 0 to n-1; runs with one seed have the same initial parameters and batches."""
    target: TargetConfig | None = None
    """What a run is to reach."""
    budget: StudyBudget = StudyBudget()
    """How long each run lasts."""
    threads: Count = 1
    """CPU threads of each run."""
    processes: Count = 1
    """Processes that each run is divided among."""
    executor: str | dict[str, Any] = SLOT_DEFAULTS["executor"]
    """Where the runs are executed: a name or a table with kind."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(seeds, tuple):
            if not seeds:
                raise ValueError("a study needs at least one seed")
            if len(set(seeds)) < len(seeds):
                raise ValueError("the same seed twice is the same run twice")
        return seeds

    @model_validator(mode="after")
    def _one_kind(self) -> StudyConfig:
        if self.axes and self.one_at_a_time:
            raise ValueError("axes (all combinations) and one_at_a_time (one change each) exclude each other")
        return self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def read_study(file: str | PathLike[str], *, sets: Sequence[str] = (), executor: str | None = None) -> StudyConfig:
    """Read a study file.

    Args:
        file: A TOML file.
        sets: Assignments ``KEY=VALUE`` to keys of the study, for example ``budget.steps=3`` or ``variants.0.name=a``.
        executor: Name of another executor than the file's.

    Returns:
        The validated file; what is in ``base``, ``axes`` and the variants is checked by `kfacore.lab.studies.planner`.

    Raises:
        ConfigError: The file is missing or malformed, or a key is wrong; the message has the nearest right one.
    """
    origin = str(file)
    values = read_table(file)
    origins: dict[tuple[str, ...], str] = {}
    if executor is not None:
        current = values.get("executor")
        workers = {k: v for k, v in current.items() if k == "workers"} if isinstance(current, Mapping) else {}
        same = current.get("kind") == executor if isinstance(current, Mapping) else current == executor
        if not same:
            values["executor"] = {"kind": executor, **workers}
    for assignment in sets:  # above the executor's name: they may be its keys
        _assign(values, assignment, origins)
    values.setdefault("name", Path(file).stem)

    def source(location: tuple[int | str, ...]) -> str:
        for length in range(len(location), 0, -1):
            key = tuple(map(str, location[:length]))
            if key in origins:
                return origins[key]
        return origin

    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, values, source)) from error


def _assign(values: dict[str, Any], assignment: str, origins: dict[tuple[str, ...], str]) -> None:
    """Lay one ``--set`` over the file."""
    key, equals, text = assignment.partition("=")
    origin = f"--set {assignment}"
    if not equals:
        raise ConfigError(f"{origin}: needs the form KEY=VALUE, for example --set budget.steps=100")
    path = tuple(key.strip().split("."))
    if path[0] not in StudyConfig.model_fields:
        if path[0] in RunConfig.model_fields:
            raise ConfigError(f"{origin}: a key of the runs is set in the base, write base.{key.strip()}")
        raise ConfigError(f"{origin}: unknown key '{path[0]}', {nearest(path[0], StudyConfig.model_fields)}")
    value = parse_value(text.strip(), origin)
    if path[0] == "executor" and len(path) > 1 and isinstance(values.get("executor", SLOT_DEFAULTS["executor"]), str):
        values["executor"] = {"kind": values.get("executor", SLOT_DEFAULTS["executor"])}
    _put(values, path, value, origin)
    origins[path] = origin


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any, origin: str) -> None:
    """Set one value; a number in the path is an index into a list, for example ``variants.0.name``."""
    table: Any = values
    for place, name in enumerate(path):
        last = place == len(path) - 1
        if isinstance(table, list):
            if not name.isdecimal() or int(name) >= len(table):
                where = ".".join(path[:place])
                raise ConfigError(f"{origin}: {where} is a list of {len(table)}, write {where}.0 for the first of them")
            if last:
                table[int(name)] = value
            else:
                table = table[int(name)]
        elif isinstance(table, dict):
            if last:
                deep_update(table, {name: value})
            else:
                table = table.setdefault(name, {})
        else:
            raise ConfigError(f"{origin}: {'.'.join(path[:place])} = {table!r:.60} is no table")


def _explain(error: ValidationError, values: Mapping[str, Any], source: Any) -> str:
    """The first error, with the home of keys that were written on the wrong level."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["loc"] and first["loc"][0] in _UNIONS:
        return _explain_union([e for e in errors if e["loc"][:1] == first["loc"][:1]], source)
    key = first["loc"][0] if len(first["loc"]) == 1 else None
    if first["type"] == "extra_forbidden" and key in RunConfig.model_fields:
        hint = STUDY_KEYS.get(str(key))
        where = f"write {hint}" if hint else f"it is a key of the runs, write base.{key}, or an axis, or in a variant"
        return f"{source(first['loc'])}: unknown key '{key}' of a study; {where}"
    return explain(error, StudyConfig, origin=source)


_UNIONS = ("seeds", "executor", "problems")
"""Fields that take values of several types: pydantic tells one error for each, with the type's name in the location."""


def _explain_union(errors: Sequence[Any], source: Any) -> str:
    """The error that comes deepest into the value, which is of the type that was meant; all if none does."""
    deepest = max(len(error["loc"]) for error in errors)
    found = [error for error in errors if len(error["loc"]) == deepest]
    location = tuple(part for place, part in enumerate(found[0]["loc"]) if place == 0 or isinstance(part, int))
    messages = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in found)
    text = " or ".join(f"{message[:1].lower()}{message[1:]}" for message in messages)
    return f"{source(location)}: {'.'.join(map(str, location))} = {found[0]['input']!r:.60}: {text}"


def study_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema of study files, for editors.

    Args:
        registry: Where the components come from.
    """
    schema = StudyConfig.model_json_schema()
    run = run_config_schema(registry)
    definitions = {**run.pop("$defs", {}), **schema.pop("$defs")}
    keys = {key: value for key, value in run["properties"].items() if key not in STUDY_KEYS}
    table = {"type": "object", "properties": keys, "additionalProperties": False}
    properties = schema["properties"]
    properties["base"] = {**table, "description": properties["base"].get("description", "")}
    variant = definitions["VariantConfig"]
    variant["properties"] = {**keys, **variant["properties"]}
    variant["additionalProperties"] = False
    names = sorted(component.name for component in registry.components("executor"))
    tables = []
    for component in registry.components("executor"):
        model = component.config.model_json_schema()
        definitions.update(model.pop("$defs", {}))
        definitions[component.config.__name__] = model
        tables.append({"$ref": f"#/$defs/{component.config.__name__}"})
    properties["executor"] = {
        "description": properties["executor"].get("description", ""),
        "anyOf": [{"type": "string", "enum": names}, *tables],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": definitions,
        "title": "kfac study",
    }
