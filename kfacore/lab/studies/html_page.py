"""The page of a report, from the first screen to what is needed to run it again. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import kfacore
from kfacore.lab.studies.figures import Pen, pens
from kfacore.lab.studies.html import cell, details, download, legend, swatch, table, toggles
from kfacore.lab.studies.html_answer import answer, facts, lost_runs, share, time_text
from kfacore.lab.studies.identity import relevant
from kfacore.lab.studies.report_data import AXES
from kfacore.lab.studies.report_results import Results
from kfacore.lab.studies.statistics import MIN_INTERVAL
from kfacore.lab.studies.tables import MEASURE_NAMES, amount, plus_minus

__all__ = ["page"]


def page(results: Results, figures: Mapping[str, Sequence[tuple[str, str]]], tables: Mapping[str, str]) -> str:
    """The whole page: one file that asks for nothing else.

    Args:
        results: The results.
        figures: By section (``"curves"``, ``"differences"``, ``"profile"``, ``"traces"``), the title of each group and
            its figures as HTML.
        tables: The files that the page offers to save, by name.
    """
    study = results.study
    styles = pens(results)
    own = [styles[name] for name in styles]
    css = files("kfacore.lab.studies").joinpath("report.css").read_text(encoding="utf-8")
    description = f"<p>{escape(study.description)}</p>" if study.description else ""
    sections = [
        lost_runs(results),
        _figures("curves", "Curves", figures, own, _curves_note(results)),
        _figures(
            "differences",
            "Differences from the reference",
            figures,
            (),
            "Dot: mean of the paired differences; bar: 95 % interval.",
        ),
        _targets(results, styles, figures),
        _measures(results, styles),
        _figures(
            "traces",
            "Traces of the optimizer",
            figures,
            (),
            "Median over the seeds that are done. Where an "
            "optimizer has no such number, it has no line. rho and mu are cut at their 1st and 99th percentile.",
        ),
        _runs(results),
        _reproduce(results, tables),
    ]
    links = "".join(
        f'<a href="#{anchor}">{title}</a>'
        for anchor, title in _LINKS
        if any(f'id="{anchor}"' in section for section in sections)
    )
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(study.name)}: report</title><style>{css}{toggles(own)}</style>"
    )
    footer = f"Written by kfac study report, kfacore {escape(kfacore.__version__)}. This page makes no request."
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>'
        f"<header><h1>{escape(study.name)}</h1>{description}{facts(results)}</header>"
        f'<main>{answer(results)}<nav aria-label="Sections">{links}</nav>{"".join(sections)}</main>'
        f'<footer><p class="note">{footer}</p></footer></body></html>\n'
    )


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Makes the browser itself hold the page to its promise; the empty icon keeps it from looking for one."""

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


def _figures(
    anchor: str, title: str, figures: Mapping[str, Sequence[tuple[str, str]]], own: Sequence[Pen], note: str
) -> str:
    groups = figures.get(anchor, ())
    if not groups:
        return ""
    parts = "".join(
        f'{f"<h3>{escape(name)}</h3>" if name else ""}<div class="grid">{content}</div>' for name, content in groups
    )
    boxes = legend(own) if own else ""
    return f'<section><h2 id="{anchor}">{title}</h2><p class="note">{escape(note)}</p>{boxes}{parts}</section>'


def _targets(results: Results, styles: Mapping[str, Pen], figures: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    if not results.targets:
        return ""
    mark = "†" if results.shared else ""
    units = {"step": "Steps", "cases": "Cases", "seconds": f"Seconds{mark}"}
    parts = []
    for problem, cells in results.cells.items():
        if problem not in results.targets:
            continue
        header = [cell("Variant", head="col"), cell("Reached", head="col")]
        header += [cell(units[axis], head="col") for axis in AXES]
        header += [
            cell(f"{what}<br>{units[axis].lower()}", head="col")
            for what in ("Gets to the reference's end:", "Reference gets to its end:")
            for axis in ("step", "seconds")
        ]
        rows = []
        for one in cells:
            first = one.targets["step"]
            values = [time_text(one.targets[axis]) for axis in AXES]
            values += [share(by.get(axis)) for by in (one.catches, one.caught) for axis in ("step", "seconds")]
            name = f"{swatch(styles[one.variant.name])}{escape(one.variant.name)}"
            rows.append(
                f"<tr>{cell(name, head='row')}{cell(f'{first.reached}/{first.n}')}"
                f"{''.join(cell(value) for value in values)}</tr>"
            )
        where = f"{problem}: " if len(results.cells) > 1 else ""
        caption = (
            f"{where}Median cost to a {MEASURE_NAMES[results.headline]} of at most {amount(results.targets[problem])}"
        )
        parts.append(table(caption, header, rows))
    source = (
        "The study names no target, so the target is the worst final value among the reference's finished runs."
        if results.target_from_reference
        else "The target is the study's."
    )
    text = (
        f'{source} Runs that never reached it stay in the median (Kaplan-Meier); "not reached" means that not more '
        "than half did, with the count. The last columns need no target: cost of a variant until it is as good as the "
        "reference was at its end, as a share of what the reference needed for that, paired by seed; and the other "
        "way round. Targets are looked for at the evaluations."
    )
    graphs = "".join(
        f'<p class="note">{escape(_PROFILE)}</p><div class="grid">{content}</div>'
        for _, content in figures.get("profile", ())
    )
    top = f'<h2 id="targets">Time to target</h2><p class="note">{escape(text)}</p>'
    return f"<section>{top}{''.join(parts)}{graphs}</section>"


_PROFILE = (
    "Performance profile (Dolan and Moré 2002): the share of all problem-seed pairs that a variant brought to the "
    "target within so many times the cost of the best variant. Higher is better; a line that stays below 1 missed some."
)


def _measures(results: Results, styles: Mapping[str, Pen]) -> str:
    header = [cell("Variant", head="col"), cell("Done", head="col")]
    for measure in results.measures:
        header += [
            cell(f"{escape(MEASURE_NAMES[measure].capitalize())}<br>final", head="col"),
            cell("best", head="col"),
        ]
    parts = []
    for problem, cells in results.cells.items():
        rows = []
        for one in cells:
            name = f"{swatch(styles[one.variant.name])}{escape(one.variant.name)}"
            values = "".join(
                cell(plus_minus(one.final[measure])) + cell(plus_minus(one.best[measure]))
                for measure in results.measures
            )
            done = cell(f"{one.count('done')}/{len(one.runs)}")
            rows.append(f"<tr>{cell(name, head='row')}{done}{values}</tr>")
        parts.append(table(f"{problem}: mean ± standard deviation over the seeds that are done", header, rows))
    note = (
        "Final: at the last evaluation. Best: the smallest value of all evaluations, which is chosen after the fact "
        "and flatters noisy methods. A run without averaged parameters is reported with its current ones."
    )
    return f'<section><h2 id="measures">All measures</h2><p class="note">{note}</p>{"".join(parts)}</section>'


def _runs(results: Results) -> str:
    mark = "†" if results.shared else ""
    names = ("Run", "Problem", "Seed", "State", "Steps", "Cases", f"Seconds{mark}", "Last", "Best")
    header = [cell(name, head="col") for name in names]
    rows = []
    for run in results.runs:
        plan = run.planned
        style = {"done": [], "diverged": ["broken"], "failed": ["broken"]}.get(run.state, ["waiting"])
        rows.append(
            f"<tr>{cell(f'{escape(plan.variant)} <code>{escape(plan.hash)}</code>', head='row')}"
            f"{cell(escape(plan.problem), 'text')}{cell(str(run.seed))}{cell(run.state, *style)}"
            f"{''.join(cell(f'{run.last(axis):,.0f}') for axis in ('step', 'cases'))}"
            f"{cell(amount(run.last('seconds'), 3) + ('†' if run.shared else ''))}"
            f"{cell(amount(run.latest(results.headline)))}{cell(amount(run.smallest(results.headline)))}</tr>"
        )
    content = table(f"All {len(rows)} runs; values: {MEASURE_NAMES[results.headline]}", header, rows)
    return f'<section><h2 id="runs">All runs</h2>{details(f"{len(rows)} runs", content)}</section>'


def _reproduce(results: Results, tables: Mapping[str, str]) -> str:
    study = results.study
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
    parts = [f'<p class="warning">{escape(text)}</p>' for text in warnings]
    parts.append(
        "<p>The study again: <code>kfac study run</code> with the study file. One run again: "
        "<code>kfac train -c runs/HASH/config.json --out FOLDER</code>, with HASH from the table of all runs.</p>"
    )
    rows = [
        f"<tr>{cell(_facts_text(facts_of), 'wrap')}{cell(str(count))}</tr>"
        for facts_of, count in (*versions.items(), *machines.items())
    ]
    parts.append(table("Versions and machines", [cell("What", "text", head="col"), cell("Runs", head="col")], rows))
    parts.append(
        details("The study as resolved (study.json)", f"<pre>{escape(_json(_passed_on(study.as_dict())))}</pre>")
    )
    for problem, cells in results.cells.items():
        for one in cells:
            run = next((run for run in one.runs if run.config), None)
            if run is not None:
                # All that the numbers depend on, and no folder of this machine: a report is made to be passed on.
                title = f"Configuration of {one.variant.name} on {problem}, seed {run.seed}"
                parts.append(details(title, f"<pre>{escape(_json(relevant(run.config)))}</pre>"))
    links = ", ".join(download(name, content) for name, content in tables.items())
    parts.append(f"<p>Tables to save: {links}.</p>")
    return f'<section><h2 id="reproduce">Reproduce</h2>{"".join(parts)}</section>'


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
    return escape(", ".join(f"{key} {value}" for key, value in flat.items()))


def _passed_on(study: Mapping[str, Any]) -> dict[str, Any]:
    """The study without the place of the data on this machine."""
    base = dict(study["base"])
    if isinstance(base.get("problem"), Mapping):
        base["problem"] = {key: value for key, value in base["problem"].items() if key != "data_dir"}
    return {**study, "base": {key: value for key, value in base.items() if key != "problem.data_dir"}}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
