"""The page of a report, from the first screen to what is needed to run it again. Imports no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kfacore
from kfacore.lab.studies.html import Cell, Row, Stroke, Table, heads, render, strokes
from kfacore.lab.studies.html_answer import answers, facts, key, lost_runs, share, time_text, verdicts
from kfacore.lab.studies.identity import relevant
from kfacore.lab.studies.pens import pens
from kfacore.lab.studies.report_data import AXES
from kfacore.lab.studies.report_limits import limits
from kfacore.lab.studies.report_results import Results
from kfacore.lab.studies.statistics import MIN_INTERVAL
from kfacore.lab.studies.tables import MEASURE_NAMES, amount, plus_minus

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["page"]

_SECTIONS = ("curves", "differences", "profile", "traces")


def page(results: Results, figures: Mapping[str, Sequence[tuple[str, Markup]]], tables: Mapping[str, str]) -> str:
    """The whole page: one file that asks for nothing else.

    Args:
        results: The results.
        figures: By section (``"curves"``, ``"differences"``, ``"profile"``, ``"traces"``), the title of each group and
            its figures as HTML.
        tables: The files that the page offers to save, by name.
    """
    lines = strokes(list(pens(results).values()))
    by_name = {line.name: line for line in lines}
    lost, targets = lost_runs(results), _targets(results, by_name)
    there = {
        "lost": lost is not None,
        "targets": targets is not None,
        **{section: bool(figures.get(section)) for section in _SECTIONS},
    }
    return render(
        study=results.study,
        version=kfacore.__version__,
        pens=lines,
        figures={section: figures.get(section, ()) for section in _SECTIONS},
        facts=facts(results),
        answers=answers(results),
        limits=limits(results),
        verdicts=verdicts(results, by_name),
        key=key(results),
        links=[(anchor, title) for anchor, title in _LINKS if there.get(anchor, True)],
        lost=lost,
        curves_note=_curves_note(results),
        targets=targets,
        measures=_measures(results, by_name),
        runs=_runs(results),
        reproduce=_reproduce(results, tables),
    )


_LINKS = (
    ("lost", "Runs not done"),
    ("curves", "Curves"),
    ("differences", "Differences"),
    ("targets", "Time to target"),
    ("measures", "All measures"),
    ("traces", "Traces"),
    ("runs", "All runs"),
    ("reproduce", "Reproduce"),
)


def _curves_note(results: Results) -> str:
    text = "Mean over the seeds that are done; "
    if len(results.study.seeds) >= MIN_INTERVAL:
        text += "band: 95 % interval of the mean."
    else:
        text += f"fewer than {MIN_INTERVAL} seeds have no band, thin lines are the single runs."
    text += " Thin dashed lines are runs that diverged or failed (✕) or are not finished (▸); they are cut at the top."
    if results.targets:
        text += " Dotted: the target."
    if results.shared:
        text += " Seconds were measured while other runs of the study used the machine."
    return text


@dataclass(frozen=True)
class _Targets:
    """How the tables are read, and one a problem."""

    note: str
    tables: Sequence[Table]


def _targets(results: Results, pens: Mapping[str, Stroke]) -> _Targets | None:
    if not results.targets:
        return None
    source = (
        "The study names no target, so the target is the worst final value among the reference's finished runs."
        if results.target_from_reference
        else "The target is the study's."
    )
    note = (
        f'{source} Runs that never reached it stay in the median (Kaplan-Meier); "not reached" means that not more '
        "than half did, with the count. The last columns need no target: cost of a variant until it is as good as the "
        "reference was at its end, as a share of what the reference needed for that, paired by seed; and the other "
        "way round. Targets are looked for at the evaluations."
    )
    return _Targets(
        note, [_target_table(results, pens, problem) for problem in results.cells if problem in results.targets]
    )


def _target_table(results: Results, pens: Mapping[str, Stroke], problem: str) -> Table:
    units = {"step": "Steps", "cases": "Examples", "seconds": f"Seconds{'†' if results.shared else ''}"}
    header = heads("Variant", "Reached", *(units[axis] for axis in AXES))
    for what in ("Gets to the reference's end:", "Reference gets to its end:"):
        header += [Cell(what, head="col", below=units[axis].lower()) for axis in ("step", "seconds")]
    rows = []
    for one in results.cells[problem]:
        first = one.targets["step"]
        values = [time_text(one.targets[axis]) for axis in AXES]
        values += [share(by.get(axis)) for by in (one.catches, one.caught) for axis in ("step", "seconds")]
        name = Cell(one.variant.name, head="row", pen=pens[one.variant.name])
        rows.append(Row([name, *map(Cell, (f"{first.reached}/{first.n}", *values))]))
    where = f"{problem}: " if len(results.cells) > 1 else ""
    goal = amount(results.targets[problem])
    return Table(f"{where}Median cost to a {MEASURE_NAMES[results.headline]} of at most {goal}", header, rows)


def _measures(results: Results, pens: Mapping[str, Stroke]) -> list[Table]:
    header = heads("Variant", "Done")
    for measure in results.measures:
        header += [Cell(MEASURE_NAMES[measure].capitalize(), head="col", below="final"), *heads("best")]
    tables = []
    for problem, cells in results.cells.items():
        rows = []
        for one in cells:
            values = [plus_minus(by[measure]) for measure in results.measures for by in (one.final, one.best)]
            name = Cell(one.variant.name, head="row", pen=pens[one.variant.name])
            rows.append(Row([name, *map(Cell, (f"{one.count('done')}/{len(one.runs)}", *values))]))
        tables.append(Table(f"{problem}: mean ± standard deviation over the seeds that are done", header, rows))
    return tables


def _runs(results: Results) -> Table:
    mark = "†" if results.shared else ""
    header = heads("Run", "Problem", "Seed", "State", "Steps", "Cases", f"Seconds{mark}", "Last", "Best")
    rows = []
    for run in results.runs:
        plan = run.planned
        style = {"done": "", "diverged": "broken", "failed": "broken"}.get(run.state, "waiting")
        cells = [
            Cell(plan.variant, head="row", code=plan.hash),
            Cell(plan.problem, "text"),
            Cell(str(run.seed)),
            Cell(run.state, style),
            *(Cell(f"{run.last(axis):,.0f}") for axis in ("step", "cases")),
            Cell(amount(run.last("seconds"), 3) + ("†" if run.shared else "")),
            Cell(amount(run.latest(results.headline))),
            Cell(amount(run.smallest(results.headline))),
        ]
        rows.append(Row(cells))
    return Table(f"All {len(rows)} runs; values: {MEASURE_NAMES[results.headline]}", header, rows)


@dataclass(frozen=True)
class _Reproduce:
    """What is needed to run it again.

    Attributes:
        warnings: What makes runs of the study differ.
        machines: Versions and machines.
        texts: Titles and contents of what is shown on demand.
        downloads: Names and links of files that the page itself holds.
    """

    warnings: Sequence[str]
    machines: Table
    texts: Sequence[tuple[str, str]]
    downloads: Sequence[tuple[str, str]]


def _reproduce(results: Results, tables: Mapping[str, str]) -> _Reproduce:
    machines = _distinct(results, ("system", "machine", "cpu", "host", "device", "threads"))
    versions = _distinct(results, ("versions",))
    warnings = []
    if len(machines) > 1:
        warnings.append(
            "The runs were made on different machines or devices, or with different threads: their seconds are not "
            "comparable."
        )
    if len(versions) > 1:
        warnings.append("The runs were made with different versions: differences may come from them.")
    rows = [
        Row([Cell(_facts_text(facts_of), "wrap"), Cell(str(count))])
        for facts_of, count in (*versions.items(), *machines.items())
    ]
    texts = [("The study as resolved (study.json)", _json(_passed_on(results.study.as_dict())))]
    for problem, cells in results.cells.items():
        for one in cells:
            run = next((run for run in one.runs if run.config), None)
            if run is not None:
                # All that the numbers depend on, and no folder of this machine: a report is made to be passed on.
                title = f"Configuration of {one.variant.name} on {problem}, seed {run.seed}"
                texts.append((title, _json(relevant(run.config))))
    header = [Cell("What", "text", "col"), *heads("Runs")]
    return _Reproduce(
        warnings,
        Table("Versions and machines", header, rows),
        texts,
        [(name, _data_link(name, content)) for name, content in tables.items()],
    )


def _data_link(name: str, content: str) -> str:
    """A link that holds the file itself."""
    kind = "text/csv" if name.endswith(".csv") else "text/plain"
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(content.encode()).decode()}"


def _distinct(results: Results, keys: Sequence[str]) -> dict[str, int]:
    """The different values that manifests have under some keys, as JSON, with the number of runs of each."""
    counts: dict[str, int] = {}
    for run in results.runs:
        if run.manifest:
            text = json.dumps({key: run.manifest.get(key) for key in keys}, sort_keys=True, default=str)
            counts[text] = counts.get(text, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _facts_text(text: str) -> str:
    values: dict[str, Any] = json.loads(text)
    flat = values["versions"] if set(values) == {"versions"} and isinstance(values["versions"], dict) else values
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def _passed_on(study: Mapping[str, Any]) -> dict[str, Any]:
    """The study without the place of the data on this machine."""
    base = dict(study["base"])
    if isinstance(base.get("problem"), Mapping):
        base["problem"] = {key: value for key, value in base["problem"].items() if key != "data_dir"}
    return {**study, "base": {key: value for key, value in base.items() if key != "problem.data_dir"}}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
