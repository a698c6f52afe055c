"""Collects what ready studies found in docs/figures/studies.json, and prints the tables of a note.

``python docs/figures/studies.py COMMIT FOLDER ...``: the commit that ran, and folders of ``kfac study run``. Studies of
the same names are replaced, the others stay; `tables.py` then makes the table of the docs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tables import table  # beside this file

from kfacore.lab.studies.plan import load_study
from kfacore.lab.studies.report_data import read_runs
from kfacore.lab.studies.report_results import Cell, Results, analyse
from kfacore.lab.studies.tables import MEASURE_NAMES, amount, plus_minus, signed

FILE = Path(__file__).with_name("studies.json")


def collected(results: Results, commit: str) -> dict[str, Any]:
    """What a study is, and a row for each variant."""
    study = results.study
    machines = {run.manifest.get("cpu", "") for run in results.runs if run.manifest}
    return {
        "what": study.description,
        "command": f"kfac study run studies/{study.name}.toml",
        "commit": commit,
        "machine": ", ".join(sorted(filter(None, machines))),
        "threads": study.threads,
        "seeds": len(study.seeds),
        "budget": dict(study.budget),
        "measure": MEASURE_NAMES[results.headline],
        "target": next(iter(results.targets.values()), None),
        "reference": study.reference,
        "rows": {cell.variant.name: _row(cell, results.headline) for cell in results.flat()},
    }


def _row(cell: Cell, measure: str) -> dict[str, Any]:
    difference = cell.differences.get(measure)
    steps = [float(run.steps["step"][-1]) for run in cell.runs if run.done and len(run.steps["step"])]
    return {
        "end": plus_minus(cell.final[measure]),
        "mean": cell.final[measure].mean,
        "values": [run.final(measure) for run in cell.runs],
        "lost": cell.lost,
        "runs": len(cell.runs),
        "difference": None if difference is None else [difference.mean, difference.low, difference.high],
        "verdict": cell.verdict,
        "tuned": _flat(next(iter(cell.variant.tuned.values()), {})),
        "steps": median(steps) if steps else None,
        "to target": {axis: [found.median, found.reached] for axis, found in cell.targets.items()},
    }


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def note(found: dict[str, Any]) -> str:
    """One study's table, for a note."""
    head = ["variant", found["measure"], "difference", "interval", "steps", "steps to target", "seconds to target"]
    return table(head, _lines(found))


def _lines(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, row in found["rows"].items():
        mean, low, high = row["difference"] or (None, None, None)
        apart = ["" if mean is None else signed(mean), "" if low is None else f"{signed(low)} to {signed(high)}"]
        tuned = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in row["tuned"].items())
        lost = f" ({row['lost']} of {row['runs']} lost)" if row["lost"] else ""
        targets = [row["to target"].get(axis, [None, 0])[0] for axis in ("step", "seconds")]
        yield [
            f"**{name}**{tuned}" if name == found["reference"] else f"{name}{tuned}",
            f"{row['end']}{lost}",
            *apart,
            amount(row["steps"]),
            *(amount(value, 3) for value in targets),
        ]


def main(commit: str, *folders: str) -> None:
    """Read, write, print."""
    everything = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for folder in folders:
        study = load_study(Path(folder))
        found = everything[study.name] = collected(analyse(study, read_runs(study)), commit)
        budget = ", ".join(f"{value:g} {key}" for key, value in found["budget"].items())
        print(f"## {study.name}: {budget}, {found['seeds']} seeds, target {found['target']}\n\n{note(found)}")
    FILE.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
