"""What tuned variants choose: the best of their tuning runs, kept in ``tuning.json``. Imports no torch.

The choice is made once and kept, because tuning runs limited by seconds would not end the same way twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfacore.errors import DataError
from kfacore.lab.studies.planner import Choices, Tuning
from kfacore.lab.studies.state import read_state
from kfacore.lab.training.figures import number
from kfacore.lab.training.files import disk_errors, write_json
from kfacore.lab.training.run import RunFolder

__all__ = ["choose", "drop_choice", "read_choices", "write_choice"]


def choose(study: Path, tuning: Tuning) -> dict[str, Any] | None:
    """The overrides of the best tuning run.

    Args:
        study: The study folder.
        tuning: The tuning, all of whose runs have ended.

    Returns:
        The overrides, of the first one if several are equally good; None if no run reached its end with a number.
    """
    best, chosen = math.inf, None
    for run, overrides in zip(tuning.runs, tuning.overrides, strict=True):
        if read_state(study, run.hash).state != "done":
            continue
        evals = [event for event in RunFolder(run.path).events() if event.get("event") == "eval"]
        value = _reported(evals[-1], tuning.measure) if evals else None
        if value is not None and value < best:
            best, chosen = value, dict(overrides)
    return chosen


def read_choices(study: Path, tunings: Sequence[Tuning]) -> Choices:
    """The choices made so far from these very tuning runs.

    Args:
        study: The study folder.
        tunings: The tunings of the study as it is now; a choice among other runs is not theirs.

    Raises:
        DataError: The file is damaged.
    """
    entries = _read(study)
    return {
        (tuning.variant, tuning.problem): entry["chosen"]
        for tuning in tunings
        if (entry := entries.get(_key(tuning))) is not None
    }


def write_choice(study: Path, tuning: Tuning, chosen: dict[str, Any]) -> dict[str, Any]:
    """Keep a choice, unless another runner was first.

    Args:
        study: The study folder.
        tuning: The tuning.
        chosen: Its best overrides.

    Returns:
        What is kept.

    Raises:
        ResourceError: The disk refused.
    """
    entries = _read(study)
    entry = entries.setdefault(_key(tuning), {"variant": tuning.variant, "problem": tuning.problem, "chosen": chosen})
    file = study / "tuning.json"
    with disk_errors(file):
        write_json(file, entries)
    kept: dict[str, Any] = entry["chosen"]
    return kept


def drop_choice(study: Path, tunings: Sequence[Tuning]) -> None:
    """Forget the choices of some tunings, so that they are made again.

    Raises:
        ResourceError: The disk refused.
    """
    entries = _read(study)
    dropped = {_key(tuning) for tuning in tunings}
    file = study / "tuning.json"
    if dropped & entries.keys():
        with disk_errors(file):
            write_json(file, {key: entry for key, entry in entries.items() if key not in dropped})


def _reported(event: Mapping[str, Any], measure: str) -> float | None:
    """A measure of an evaluation; before there are averaged parameters, that of the current ones (as in the report)."""
    value = number(event.get(measure))
    if value is None and measure.startswith("averaged_"):
        value = number(event.get(measure.removeprefix("averaged_")))
    return value


def _key(tuning: Tuning) -> str:
    """A choice belongs to the runs it was made from."""
    return f"{tuning.variant}/{tuning.problem}/{tuning.measure}/" + "+".join(run.hash for run in tuning.runs)


def _read(study: Path) -> dict[str, Any]:
    file = study / "tuning.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; delete it, and the choice is made again") from error
    return content
