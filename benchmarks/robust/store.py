"""Where records are kept: one JSON file, written anew after every run, so that a race can be cut off and go on."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.robust.contenders import family
from benchmarks.robust.race import Budget, Record

__all__ = ["Key", "Store", "code", "facts", "key", "paces", "text"]

Key = tuple[str, int, str]
"""Problem, seed, contender."""

_ROOT = Path(__file__).parents[2]


def key(record: Record) -> Key:
    """What there is one record of."""
    return record["problem"], record["seed"], record["contender"]


def paces(file: Path) -> dict[tuple[str, str], float]:
    """Processor seconds of a step, by problem and by contender or family: the medians of a file's runs."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in json.loads(file.read_text())["runs"]:
        if record["steps"] and record["error"] is None:
            name = record["contender"] if family(record["contender"]) == "kfac" else family(record["contender"])
            found.setdefault((record["problem"], name), []).append(record["used"] / record["steps"])
    return {key: median(costs) for key, costs in found.items()}


class Store:
    """The records of one race, and the file that they are in.

    Args:
        file: Read if it is there; without one nothing is kept.
        budget: Of the race; records of another one are not taken up.
    """

    def __init__(self, file: Path | None, budget: Budget) -> None:
        self._file = file
        self._budget = budget
        self._records: dict[Key, Record] = {}
        self._lines: dict[Key, str] = {}
        self._made_by = {"code": code(), "commit": _commit()}  # now: the source may change while runs go on
        if file is not None and file.is_file():
            self.take(file)

    def take(self, file: Path, *, kfac: bool = True) -> int:
        """Take up another file's records: those of the same budget, and K-FAC's only if its code is the same.

        Args:
            file: An earlier answer of this benchmark.
            kfac: Whether K-FAC's come too.

        Returns:
            How many were taken.
        """
        taken = 0
        for record in json.loads(file.read_text())["runs"]:
            same = record["budget"] == vars(self._budget)
            if family(record["contender"]) == "kfac":
                same = same and kfac and record["code"] == code()
            if same and key(record) not in self._records:
                self._keep({name: _read(name, value) for name, value in record.items()})
                taken += 1
        return taken

    def __contains__(self, wanted: Key) -> bool:
        return wanted in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, record: Record) -> None:
        """Keep one more, also in the file."""
        self._keep({**record, **self._made_by})
        self.save()

    def _keep(self, record: Record) -> None:
        self._records[key(record)] = record
        self._lines[key(record)] = text(record)

    def save(self, **more: Any) -> None:
        """Write everything, and what more there is to say, replacing the file in one move."""
        if self._file is None:
            return
        content = {"benchmark": "robust", "settings": facts(self._budget), **more}
        runs = ",\n".join(self._lines.values())
        part = self._file.with_name(self._file.name + ".part")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(f'{text(content)[:-1]}, "runs": [\n{runs}\n]}}\n')
        os.replace(part, self._file)


_NUMBERS = {"first", "best", "final", "first_test", "best_test", "final_test", "last_ten", "best_ten", "noise"}


def _read(name: str, value: Any) -> Any:
    return math.nan if name in _NUMBERS and value is None else value


def text(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have, and six digits."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@cache
def code() -> str:
    """A checksum of the optimizer's and its parts' source: records of other source are not K-FAC's as it is now."""
    digest = sha256()
    for folder in ("kfacore", "plugins/kfac_plugins"):
        for file in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def facts(budget: Budget | None = None) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        **({} if budget is None else {"budget": dict(vars(budget))}),
        "commit": _commit(),
        "code": code(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": 1,
    }


@cache
def _commit() -> str | None:
    asked = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
