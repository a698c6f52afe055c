"""The study folder: which runs a study has, what they are called, and in which state they are. Imports no torch.

::

    study.json       the resolved study: name, base, variants, problems, seeds, target, budget, versions
    index.json       one entry a run: hash, variant, problem, seed, state, reason
    tuning.json      what the tuned variants chose, if the study has any (`kfacore.lab.studies.tuning`)
    runs/HASH/       the run folders, just as ``kfac train`` makes them
    state/HASH/      who executes a run and how it ended (`kfacore.lab.studies.state`)

The states in ``index.json`` are those of its last writing; `load_study` reads them from ``state`` and is never behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from kfacore.errors import ConfigError, DataError
from kfacore.lab.studies.state import State, read_state
from kfacore.lab.training.files import disk_errors, write_json

__all__ = ["FORMAT", "STATES", "PlannedRun", "Study", "Target", "Variant", "load_study"]

FORMAT = 1
"""Raised when a study folder can no longer be read by older versions."""

STATES: tuple[str, ...] = get_args(State)
"""The states of a run, in the order of their life."""


@dataclass(frozen=True)
class Target:
    """What a run is to reach, for time-to-target.

    Attributes:
        measure: A key of the evaluation events, for example ``"averaged_train_error"``.
        value: It is reached at the first evaluation with this value or less.
    """

    measure: str
    value: float


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        name: Its name, unique in the study.
        overrides: What it changes in the base, as a table of a configuration file; empty for the base itself.
        tuned: For a tuned variant what each problem's tuning chose, by problem; empty before that.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        hash: Its name: a hash of everything its numbers depend on.
        variant: Name of the variant.
        problem: Name of the problem, as in `Study.problems`.
        seed: Its seed; runs of one problem and one seed share initial parameters and batches.
        state: ``"pending"``, ``"running"``, ``"done"``, ``"failed"`` (a crash, a kill, an error) or ``"diverged"``.
        reason: Why it failed or diverged; empty otherwise.
        path: The run folder, which exists once the run has begun.
        config: The resolved configuration in JSON types; empty if the study was read from its folder.
    """

    hash: str
    variant: str
    problem: str
    seed: int
    state: State = "pending"
    reason: str = ""
    path: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def as_entry(self) -> dict[str, Any]:
        """The run as an entry of ``index.json``."""
        return {name: getattr(self, name) for name in ("hash", "variant", "problem", "seed", "state", "reason")}


@dataclass(frozen=True)
class Study:
    """A study with its runs.

    Attributes:
        name: Name of the study.
        description: What it is about, in the author's words.
        folder: The study folder.
        base: The configuration that all variants start from, as a table of a configuration file.
        variants: What is compared, in the order of the file.
        reference: Name of the variant that the others are compared with.
        problems: Names of the problems.
        seeds: The seeds, paired over the variants.
        target: What is to be reached, or None.
        budget: ``steps``, ``cases`` and ``seconds`` of a run, those that are limited.
        threads: CPU threads of a run, in each of its processes.
        processes: Processes of a run.
        versions: Versions that the numbers depend on.
        runs: The runs; tuning runs are not among them.
    """

    name: str
    description: str
    folder: Path
    base: Mapping[str, Any]
    variants: tuple[Variant, ...]
    reference: str
    problems: tuple[str, ...]
    seeds: tuple[int, ...]
    target: Target | None
    budget: Mapping[str, float]
    threads: int
    versions: Mapping[str, str]
    runs: tuple[PlannedRun, ...] = ()
    processes: int = 1

    @property
    def study_file(self) -> Path:
        """``study.json``."""
        return self.folder / "study.json"

    @property
    def index_file(self) -> Path:
        """``index.json``."""
        return self.folder / "index.json"

    def of(self, variant: str, problem: str | None = None) -> tuple[PlannedRun, ...]:
        """The runs of a variant, by seed; of one problem or of all."""
        return tuple(run for run in self.runs if run.variant == variant and problem in (None, run.problem))

    def counts(self) -> dict[str, int]:
        """How many runs are in each state."""
        return {state: sum(run.state == state for run in self.runs) for state in STATES}

    def refreshed(self) -> Study:
        """The same study with the states that its runs have now."""
        return replace(self, runs=self.as_found(self.runs))

    def as_found(self, runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
        """Runs of this study's folder, for tuning or not, with the states that they have now."""
        states = {name: read_state(self.folder, name) for name in {run.hash for run in runs}}
        return tuple(
            replace(run, state=states[run.hash].state, reason=states[run.hash].reason, path=self.path_of(run.hash))
            for run in runs
        )

    def path_of(self, name: str) -> Path:
        """The run folder of a hash."""
        return self.folder / "runs" / name

    def as_dict(self) -> dict[str, Any]:
        """The study without its runs, in JSON types."""
        return {
            "format": FORMAT,
            "name": self.name,
            "description": self.description,
            "base": dict(self.base),
            "variants": [
                {"name": v.name, "overrides": dict(v.overrides), "tuned": dict(v.tuned)} for v in self.variants
            ],
            "reference": self.reference,
            "problems": list(self.problems),
            "seeds": list(self.seeds),
            "target": None if self.target is None else {"measure": self.target.measure, "value": self.target.value},
            "budget": dict(self.budget),
            "threads": self.threads,
            **({"processes": self.processes} if self.processes > 1 else {}),
            "versions": dict(self.versions),
        }

    def write(self) -> None:
        """Write ``study.json``.

        Raises:
            ResourceError: The disk refused.
        """
        with disk_errors(self.study_file):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.study_file, self.as_dict())

    def write_index(self) -> None:
        """Write ``index.json`` with the states that `runs` have. Raises like `write`."""
        entries = [run.as_entry() for run in self.runs]
        with disk_errors(self.index_file):
            write_json(self.index_file, entries)


def load_study(folder: Path) -> Study:
    """Read a study folder.

    Args:
        folder: The folder that ``kfac study run`` wrote.

    Returns:
        The study; its runs have their present states.

    Raises:
        ConfigError: There is no study in the folder.
        DataError: A file of it is damaged, or of another version.
    """
    folder = Path(folder)
    study = folder / "study.json"
    if not study.is_file():
        raise ConfigError(f"{folder} is not a study folder: it has no study.json; kfac study run FILE makes one")
    content = _read(study)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else "no table"
        raise DataError(f"{study} has format {found}, this version reads {FORMAT}; use the version that wrote it")
    index = folder / "index.json"
    entries = _read(index) if index.is_file() else []
    try:
        return _from_json(folder, content, entries).refreshed()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the study in {folder} cannot be read: {type(error).__name__} {error}; run kfac study run FILE again"
        ) from error


def _from_json(folder: Path, content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Study:
    target = content["target"]
    return Study(
        name=str(content["name"]),
        description=str(content["description"]),
        folder=folder,
        base=dict(content["base"]),
        variants=tuple(
            Variant(str(variant["name"]), dict(variant["overrides"]), dict(variant["tuned"]))
            for variant in content["variants"]
        ),
        reference=str(content["reference"]),
        problems=tuple(map(str, content["problems"])),
        seeds=tuple(map(int, content["seeds"])),
        target=None if target is None else Target(str(target["measure"]), float(target["value"])),
        budget=dict(content["budget"]),
        threads=int(content["threads"]),
        processes=int(content.get("processes", 1)),
        versions=dict(content["versions"]),
        runs=tuple(
            PlannedRun(str(entry["hash"]), str(entry["variant"]), str(entry["problem"]), int(entry["seed"]))
            for entry in entries
        ),
    )


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}; delete it, and kfac study run FILE writes it anew") from error
