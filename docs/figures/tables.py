"""The tables of README and docs that hold measured or configured numbers; none of them is typed.

``python docs/figures/tables.py`` writes them, between the lines ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
NAME is a JSON file in this folder, or one of `MADE`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kfacore.schema.presets import PRESETS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `benchmarks`
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROBUST = ROOT / "benchmarks" / "results" / "robust.json"
"""Runs of ``python -m benchmarks robust``, if they are in the repository: its table is empty without them."""
REAL = ROOT / "benchmarks" / "results" / "real.json"
"""Likewise of ``python -m benchmarks real``."""
GPU = ROOT / "benchmarks" / "results" / "gpu-h100.json"
"""What ``bash benchmarks/gpu.sh`` wrote on a GPU."""

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def measured(file: Path) -> str:
    """A file with ``columns`` and ``rows``, and perhaps the ``head`` of the first column; null is an empty cell."""
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = ([name, *("" if cell is None else str(cell) for cell in cells)] for name, cells in data["rows"].items())
    return table([data.get("head", ""), *data["columns"]], rows)


def preset() -> str:
    """Every value of the preset ``default``, beside that of ``paper``."""
    paper = dict(_flat(PRESETS["paper"]))
    pairs = ((key, value, paper.get(key, "")) for key, value in _flat(PRESETS["default"]) if not key.endswith(".kind"))
    kinds = {"trust": (PRESETS["default"]["trust"]["kind"], PRESETS["paper"]["trust"]["kind"])}
    rows = [[f"`{key}`", _word(theirs), _word(own)] for key, own, theirs in pairs]
    rows += [[f"`{slot}`", theirs, own] for slot, (own, theirs) in kinds.items()]
    return table(["key", "`paper`", "`default`"], rows)


def robust(file: Path = ROBUST) -> str:
    """K-FAC with nothing set against the others: on how many problems it keeps up, and on how many it is ahead."""
    if not file.exists():
        return ""
    from benchmarks.robust.table import standing, summary

    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
    rows = []
    for contender in sorted({run["contender"] for run in records if run["contender"].startswith("kfac")}):
        counts = summary(records, contender)
        said = f"`{contender.partition(':')[2]}`: {counts['diverged']} of {counts['runs']} runs diverge"
        for line in standing(records, contender):
            close = next(key for key in line if key.startswith("<="))
            cells = [line["problems"], line[close], line["< 1"], f"{line['median']:.2g}"]
            test, _, other = line[""].partition(" ")[2].rpartition("/ ")
            rows.append([said, f"{other.capitalize()}'s {test or 'training '}loss", *map(str, cells)])
            said = ""
    return table(["", "at the end against", "problems", "within 1.5 times", "better", "median ratio"], rows)


def real(file: Path = REAL) -> str:
    """Every method on every model: losses at the end, and its way to AdamW's."""
    if not file.exists():
        return ""
    from benchmarks.real.table import rows

    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
    longest = {model: max(r["seconds"] for r in records if r["model"] == model) for model in _names(records, "model")}
    lines = []
    for model, seconds in longest.items():
        runs = [record for record in records if record["model"] == model and record["seconds"] == seconds]
        for row in rows(runs):
            numbers = ("training loss", "held-out loss", "share of its steps", "share of its seconds")
            cells = [f"{model}, {seconds:g} s", row[""], str(row["batch"]), _short(row["rate"]), str(row["steps"])]
            lines.append([*cells, *(_short(row[name]) for name in numbers)])
    head = ["model", "method", "batch", "rate", "steps", "training loss", "held-out loss"]
    return table([*head, "share of AdamW's steps", "of its seconds"], lines)


STUDIES = {
    "figure4-curves": "CURVES",
    "figure4-mnist": "MNIST",
    "figure4-faces": "FACES",
    "figure9-curves": "CURVES",
    "figure9-mnist": "MNIST",
    "figure9-faces": "FACES",
    "networks-gpt": "GPT",
    "networks-cnn": "CNN",
}
"""Ready studies and the heads of their columns; a budget is added. The ablation is in a note."""


SHORT = ("figure4-curves", "figure4-mnist", "networks-gpt", "networks-cnn")
"""Of these the README has what people choose between."""


def studies(names: Iterable[str] = STUDIES, leave_out: Iterable[str] = ()) -> str:
    """Every variant of ready studies at the end, the smallest mean of each in bold."""
    file = HERE / "studies.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    shown = {name: found[name] for name in names if name in found}
    head = [f"{STUDIES[name]}, {_budget(study['budget'])}" for name, study in shown.items()]
    kept = {name: {v: row for v, row in study["rows"].items() if v not in leave_out} for name, study in shown.items()}
    best = {
        name: min((row["mean"] for row in rows.values() if row["mean"]), default=None) for name, rows in kept.items()
    }
    lines = []
    for variant in dict.fromkeys(variant for rows in kept.values() for variant in rows):
        found_here = [(rows.get(variant), best[name]) for name, rows in kept.items()]
        cells = ["" if row is None else _marked(row["end"], row["mean"] == smallest) for row, smallest in found_here]
        lines.append([variant, *cells])
    return table(["", *head], lines)


def gpu(file: Path = GPU) -> str:
    """Steps of every contender on every net."""
    tables: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"]
    lines = []
    for found in tables:
        kind, _, net = found["title"].removesuffix(", cuda").partition(": ")
        for row in found["rows"] if kind == "step" else ():
            numbers = [row[key] for key in ("median ms", "median / AdamW", "slowest ms")]
            lines.append([net, row["optimizer"], *map(_short, numbers), f"{row['peak MB'] / 1e3:.2g}"])
            net = ""
    return table(["", "", "ordinary step, ms", "over AdamW's", "slowest step, ms", "peak, GB"], lines)


def results() -> str:
    """The README's part of `studies`."""
    return studies(SHORT, leave_out=("tridiag, no momentum", "ekfac"))


def _marked(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


UNITS = {"seconds": "s", "steps": "steps", "cases": "examples"}


def _budget(budget: dict[str, float]) -> str:
    return ", ".join(f"{value:,.0f} {UNITS[key]}" for key, value in budget.items())


def _names(records: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


MADE: dict[str, Callable[[], str]] = {
    "preset": preset,
    "robust": robust,
    "real": real,
    "gpu": gpu,
    "studies": studies,
    "results": results,
}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def written(text: str) -> str:
    """A document with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[2]
        return match[1] + (MADE[name]() if name in MADE else measured(HERE / f"{name}.json")) + match[3]

    return MARKED.sub(made, text)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
