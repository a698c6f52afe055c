"""Runs that were made: one JSON file, written anew after each, so that a race can be cut off and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.real.race import Record, Run, race
from benchmarks.robust.store import code, facts, text

__all__ = ["Runs"]


class Runs:
    """The runs of a file.

    Args:
        file: Read if it is there; without one nothing is kept.
        data: Folder of the data.
        again: Methods whose runs are made anew.
    """

    def __init__(self, file: Path | None, data: Path, again: tuple[str, ...] = ()) -> None:
        self._file, self._data = file, data
        self._found: dict[Run, Record] = {}
        if file is not None and file.is_file():
            for record in json.loads(file.read_text())["runs"]:
                if record["method"] not in again:
                    self._found[_run(record)] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(self._found.values())

    def done(self, run: Run) -> Record:
        """The record of a run, which is made if there is none."""
        if run not in self._found:
            record = {**race(run, self._data), "code": code()}
            self._found[run] = record
            self._save()
            last = record["curve"][-1]
            said = record["error"] or f"{last[3]:.4f} held out after {record['steps']} steps, {last[1]:.1f} s"
            rate = "" if run.rate is None else f", rate {run.rate:g}"
            print(f"{run.model} {run.method}, mini-batches of {run.batch}{rate}: {said}", flush=True)
        return self._found[run]

    def _save(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_name(self._file.name + ".part")
        runs = ",\n".join(map(text, self))
        part.write_text(f'{{"benchmark": "real", "settings": {text(facts())}, "runs": [\n{runs}\n]}}\n')
        os.replace(part, self._file)


def _run(record: Record) -> Run:
    return Run(**{name: record[name] for name in Run.__dataclass_fields__})
