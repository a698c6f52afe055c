"""From a study file to its runs: variants x problems x seeds, each resolved, validated and named. Imports no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import ConfigError, KfacError, nearest
from kfacore.lab.config.resolve import resolve_layers
from kfacore.lab.config.sources import finish, put, table_layer
from kfacore.lab.studies.config import STUDY_KEYS, StudyBudget, StudyConfig, TuneConfig
from kfacore.lab.studies.identity import run_hash, run_versions
from kfacore.lab.studies.plan import PlannedRun, Study, Target, Variant
from kfacore.registry.compose import Layer, deep_update

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["Choices", "Plan", "Tuning", "plan_study"]

UNLIMITED_STEPS = 1_000_000_000
"""Steps of a run that only cases or seconds limit."""

Choices = Mapping[tuple[str, str], Mapping[str, Any]]
"""What tuning chose, a table of overrides, by (variant, problem)."""


@dataclass(frozen=True)
class Tuning:
    """The tuning of one variant on one problem.

    Attributes:
        variant: Name of the variant.
        problem: Name of the problem.
        measure: Number of the last evaluation that decides.
        runs: The tuning runs.
        overrides: What each of them changes in the variant, in the same order.
    """

    variant: str
    problem: str
    measure: str
    runs: tuple[PlannedRun, ...]
    overrides: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """All runs of a study as far as they are known.

    Attributes:
        study: The study with the runs whose configuration is known.
        tunings: What must be tuned first; done or not.
        waiting: (variant, problem) pairs whose runs wait for their tuning.
    """

    study: Study
    tunings: tuple[Tuning, ...] = ()
    waiting: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> int:
        """Runs in all: planned, waiting and for tuning."""
        tuning = sum(len(tuning.runs) for tuning in self.tunings)
        return len(self.study.runs) + tuning + len(self.waiting) * len(self.study.seeds)


@dataclass(frozen=True)
class _Draft:
    """A variant before it is resolved: the layers that make it."""

    name: str
    layers: tuple[Layer, ...]
    overrides: dict[str, Any] = field(default_factory=dict)
    tune: TuneConfig | None = None


def plan_study(
    registry: Registry,
    config: StudyConfig,
    folder: Path,
    *,
    origin: str = "study",
    data_dir: str | None = None,
    choices: Choices | None = None,
) -> Plan:
    """Resolve every run of a study.

    Args:
        registry: Where the components come from.
        config: The study file.
        folder: The study folder.
        origin: The file's name, for messages.
        data_dir: Folder of the data files of all problems.
        choices: What tuning has chosen so far.

    Raises:
        ConfigError: A key, name or value is wrong, there are no runs, or two variants are the same.
        PluginError: A component belongs to a plug-in that cannot be used.
    """
    return _Planner(registry, config, folder, origin, data_dir, choices or {}).plan()


class _Planner:
    def __init__(
        self,
        registry: Registry,
        config: StudyConfig,
        folder: Path,
        origin: str,
        data_dir: str | None,
        choices: Choices,
    ) -> None:
        self.registry = registry
        self.config = config
        self.folder = folder
        self.origin = origin
        self.data_dir = data_dir
        self.choices = choices
        self.versions: dict[str, str] = {}

    def plan(self) -> Plan:
        config = self.config
        self._layer(config.base, "[base]")
        drafts = list(self._drafts())
        names = [draft.name for draft in drafts]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{self.origin}: two variants are called '{name}'; give each its own name")
        if not drafts:
            raise ConfigError(f"{self.origin}: the study has no runs: an axis has no values")
        problems = self._problems()
        reference = config.reference or names[0]
        if reference not in names:
            raise ConfigError(f"{self.origin}: reference = '{reference}' is no variant, {nearest(reference, names)}")
        # The base alone first, as its author's own: a key that its optimizer does not use is a slip there.
        for layer in problems.values():
            self._resolve([self._layer(config.base, "[base]"), *layer], config.budget, config.all_seeds[0])
        runs, tunings, waiting = [], [], []
        for draft, (problem, layer) in itertools.product(drafts, problems.items()):
            chosen: list[Layer] = []
            if draft.tune is not None:
                tunings.append(self._tuning(draft, draft.tune, problem, layer))
                choice = self.choices.get((draft.name, problem))
                if choice is None:
                    waiting.append((draft.name, problem))
                    continue
                chosen = [self._layer(choice, f"tuning of '{draft.name}'")]
            for seed in config.all_seeds:
                layers = [self._base(), *layer, *draft.layers, *chosen]
                runs.append(self._run(draft.name, problem, seed, layers, config.budget))
        # Tuning may well choose what another variant has: default against tuned is a study.
        self._refuse_twins(runs, [draft.name for draft in drafts if draft.tune is None])
        target = config.target
        study = Study(
            name=config.name,
            description=config.description,
            folder=self.folder,
            base=config.base,
            variants=tuple(Variant(d.name, d.overrides, self._tuned(d)) for d in drafts),
            reference=reference,
            problems=tuple(problems),
            seeds=config.all_seeds,
            target=None if target is None else Target(target.measure, target.value),
            budget={k: v for k, v in config.budget.model_dump().items() if v is not None},
            threads=config.threads,
            processes=config.processes,
            versions=dict(self.versions),
            runs=tuple(runs),
        )
        return Plan(study, tuple(tunings), tuple(waiting))

    def _tuned(self, draft: _Draft) -> dict[str, Mapping[str, Any]]:
        return {problem: choice for (name, problem), choice in self.choices.items() if name == draft.name}

    def _base(self) -> Layer:
        """The base under a variant: what the variant's optimizer does not use of it is left out."""
        layer = self._layer(self.config.base, "[base]")
        return replace(layer, user=False)

    def _layer(self, values: Mapping[str, Any], where: str) -> Layer:
        """A layer from a table in the file.

        Raises:
            ConfigError: A key is unknown, or belongs to the study as a whole.
        """
        for key in values:
            self._refuse_study_key(key, where)
        return table_layer(values, f"{self.origin} {where}", user=True)

    def _refuse_study_key(self, key: str, where: str) -> None:
        top = key.partition(".")[0]
        if top in STUDY_KEYS:
            raise ConfigError(
                f"{self.origin} {where}: '{key}' belongs to the study as a whole, write {STUDY_KEYS[top]} there"
            )

    def _problems(self) -> dict[str, tuple[Layer, ...]]:
        """The layers of each problem by its name; one without layers if the base decides."""
        config = self.config
        places: tuple[Layer, ...] = ()
        if self.data_dir is not None:
            place = Layer("--data-dir", user=True)
            put(place, "problem.data_dir", self.data_dir)
            places = (finish(place),)
        if not config.problems:
            layers = (self._base(), *places)
            kind = self._resolve(list(layers), config.budget, 0).problem.kind
            return {kind: places}
        found: dict[str, tuple[Layer, ...]] = {}
        for index, problem in enumerate(config.problems):
            if problem in config.problems[:index]:
                raise ConfigError(f"{self.origin} problems[{index}]: {problem!r} is there twice; leave one of them out")
            layer = self._layer({"problem": problem}, f"problems[{index}]")
            kind = self._resolve([self._base(), layer, *places], config.budget, 0).problem.kind
            name = kind
            for number in itertools.count(2):
                if name not in found:
                    break
                name = f"{kind}-{number}"
            found[name] = (layer, *places)
        return found

    def _drafts(self) -> Iterator[_Draft]:
        """The variants in the order of the file."""
        config = self.config
        if config.axes:
            for combination in _grid(config.axes, f"{self.origin} [axes]"):
                yield self._axis_draft(combination, "[axes]")
        elif config.one_at_a_time:
            yield _Draft("base", ())
            for key, values in _leaves(config.one_at_a_time, f"{self.origin} [one_at_a_time]"):
                for value in values:
                    yield self._axis_draft({key: value}, "[one_at_a_time]")
        elif not config.variants:
            yield _Draft("base", ())
        for variant in config.variants:
            where = f"[[variants]] '{variant.name}'"
            layer = self._layer(variant.overrides, where)
            self._refuse_problem(layer, where)
            yield _Draft(variant.name, (layer,), layer.values, variant.tune)

    def _axis_draft(self, values: Mapping[str, Any], where: str) -> _Draft:
        """A variant from values of axes, each with its own origin for messages."""
        layers = [self._axis_layer(key, value, where) for key, value in values.items()]
        overrides: dict[str, Any] = {}
        for layer in layers:
            deep_update(overrides, layer.values)
            self._refuse_problem(layer, where)
        return _Draft(_label(values), tuple(layers), overrides)

    def _axis_layer(self, key: str, value: Any, where: str) -> Layer:
        self._refuse_study_key(key, where)
        origin = f"{self.origin} {where} {key} = {json.dumps(value, ensure_ascii=False, default=str)}"
        layer = Layer(origin, user=True)
        put(layer, key, value)
        return finish(layer)

    def _refuse_problem(self, layer: Layer, where: str) -> None:
        """Another problem is no variant: its runs cannot be paired."""
        if "kind" in layer.values.get("problem", {}):
            raise ConfigError(
                f'{self.origin} {where}: a variant cannot change the problem; write problems = ["...", "..."] in the '
                "study, and every variant is run on each"
            )

    def _tuning(self, draft: _Draft, tune: TuneConfig, problem: str, layer: Sequence[Layer]) -> Tuning:
        """The tuning runs of a variant on a problem."""
        where = f"[variants.tune] of '{draft.name}'"
        seed = self.config.all_seeds[0] if tune.seed is None else tune.seed
        own = any(value is not None for value in tune.budget.model_dump().values())
        budget = tune.budget if own else self.config.budget
        runs, overrides = [], []
        for combination in _grid(tune.axes, f"{self.origin} {where}"):
            candidate = self._axis_draft(combination, where)
            layers = [self._base(), *layer, *draft.layers, *candidate.layers]
            runs.append(self._run(draft.name, problem, seed, layers, budget))
            overrides.append(candidate.overrides)
        if not runs:
            raise ConfigError(f"{self.origin} {where}: there is nothing to try: an axis has no values")
        return Tuning(draft.name, problem, tune.measure, tuple(runs), tuple(overrides))

    def _run(self, variant: str, problem: str, seed: int, layers: Sequence[Layer], budget: StudyBudget) -> PlannedRun:
        try:
            config = self._resolve(layers, budget, seed)
        except KfacError as error:
            raise type(error)(f"variant '{variant}': {error}") from error
        self.versions.update(run_versions(self.registry, config))
        name = run_hash(self.registry, config)
        return PlannedRun(name, variant, problem, seed, path=self.folder / "runs" / name, config=config.as_dict())

    def _resolve(self, layers: Sequence[Layer], budget: StudyBudget, seed: int) -> RunConfig:
        """The configuration of one run, with what the study decides on top."""
        top = Layer(f"{self.origin} (the study)", user=True)
        put(top, "seed", seed)
        put(top, "threads", self.config.threads)
        if self.config.processes > 1:
            put(top, "processes", self.config.processes)
        limits = {key: value for key, value in (("cases", budget.cases), ("seconds", budget.seconds)) if value}
        if budget.steps is not None or limits:
            put(top, "steps", budget.steps or UNLIMITED_STEPS)
        if limits:
            put(top, "budget", limits)
        config = resolve_layers(self.registry, [*layers, finish(top)])
        if not any(sink.kind == "jsonl" for sink in config.sink):
            raise ConfigError(
                f"{self.origin}: the runs have no jsonl sink, which keeps what a study compares; add it to sink"
            )
        return config

    def _refuse_twins(self, runs: Sequence[PlannedRun], names: Sequence[str]) -> None:
        """Two variants with the same runs on every problem are a slip."""
        hashes = {name: tuple(run.hash for run in runs if run.variant == name) for name in names}
        for one, other in itertools.combinations(names, 2):
            if hashes[one] and hashes[one] == hashes[other]:
                raise ConfigError(
                    f"{self.origin}: the variants '{one}' and '{other}' are the same: they resolve to the same "
                    "configuration; leave one of them out"
                )


def _leaves(table: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The axes in a table by dotted key; TOML makes nested tables of dotted keys.

    Raises:
        ConfigError: An axis has no list of values.
    """
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, origin, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, list(value)
        else:
            raise ConfigError(f"{origin}: {name} = {value!r}: an axis needs a list of values, write {name} = [...]")


def _grid(axes: Mapping[str, Any], origin: str) -> Iterator[dict[str, Any]]:
    """All combinations, the last axis fastest."""
    leaves = list(_leaves(axes, origin))
    for values in itertools.product(*(values for _, values in leaves)):
        yield dict(zip((key for key, _ in leaves), values, strict=True))


def _label(values: Mapping[str, Any]) -> str:
    """What a combination of values is called: ``approx=tridiag, damping.lambda0=1.0``."""
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key}={_text(item)}" for key, item in value.items() if key != "kind")
        kind = str(value.get("kind", ""))
        return f"{kind}({rest})" if kind and rest else kind or f"({rest})"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)
