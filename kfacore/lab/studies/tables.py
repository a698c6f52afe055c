"""The numbers of a report as CSV files, complete, and as LaTeX tables, rounded for a paper. Imports no torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from kfacore.lab.studies.report_data import AXES
from kfacore.lab.studies.report_results import Cell, Results
from kfacore.lab.studies.statistics import Difference, Summary, ToTarget

__all__ = [
    "MEASURE_NAMES",
    "amount",
    "counted",
    "csv_tables",
    "interval",
    "latex_tables",
    "plus_minus",
    "probability",
    "signed",
]

MEASURE_NAMES = {
    f"{prefix}{part}_{name}": f"{title} {name}{suffix}"
    for prefix, suffix in (("", ""), ("averaged_", ", averaged parameters"))
    for part, title in (("train", "training"), ("test", "test"))
    for name in ("error", "loss")
}
"""What the measures are called in sentences."""

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

_UNITS = {"step": "steps", "cases": "examples", "seconds": "seconds"}


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 seed, 2 seeds."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def amount(value: float | None, digits: int = 4) -> str:
    """A number for people, with so many significant digits; a dash for None."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e9:
        text = f"{value:,.0f}" if abs(value) >= 1.0 else f"{value:.{digits + 3}f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign."""
    return f"+{amount(value, digits)}" if value is not None and value > 0 else amount(value, digits)


def plus_minus(summary: Summary) -> str:
    """``mean ± s``: the spread with two digits, the mean down to the same place."""
    if summary.mean is None:
        return DASH
    if not summary.std or summary.std < 1e-12 * abs(summary.mean):  # equal values, but for rounding
        return amount(summary.mean)
    place = 1 - math.floor(math.log10(summary.std))
    if not 1e-3 <= abs(summary.mean) < 1e6 or place > 6:
        return f"{amount(summary.mean)} ± {amount(summary.std, 2)}"
    decimals = max(0, place)
    return f"{summary.mean:.{decimals}f} ± {summary.std:.{decimals}f}".replace("-", MINUS)


def interval(low: float | None, high: float | None) -> str:
    """``[low, high]``, or nothing where there is no interval."""
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def probability(p: float | None) -> str:
    """A p value; a dash where there was no test."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def csv_tables(results: Results) -> dict[str, str]:
    """The content of the CSV files, by name.

    Args:
        results: The results.

    Returns:
        ``runs`` has a row for each run; ``final`` one for each variant, measure and kind (final, best); ``differences``
        one for each comparison and measure; ``targets`` one for each variant and axis; ``profile`` the steps of the
        profiles. Numbers have all their digits; what does not exist is empty.
    """
    tables = {"runs": _runs(results), "final": _final(results), "differences": _differences(results)}
    if results.targets:
        tables["targets"] = _targets(results)
    if results.profiles:
        tables["profile"] = _profile(results)
    return {f"{name}.csv": _csv(rows) for name, rows in tables.items()}


def latex_tables(results: Results) -> dict[str, str]:
    r"""The content of the LaTeX tables, by name: ``\input`` them with the packages booktabs and graphicx loaded.

    Args:
        results: The results.
    """
    tables = {"final.tex": _latex_final(results)}
    if any(len(cells) > 1 for cells in results.cells.values()):
        tables["differences.tex"] = _latex_differences(results)
    if results.targets:
        tables["targets.tex"] = _latex_targets(results)
    return tables


def _csv(rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _runs(results: Results) -> list[Sequence[object]]:
    reached = [f"target_{axis}" for axis in AXES]
    header = ["problem", "variant", "seed", "hash", "state", "reason", *_UNITS.values(), "shared_machine", *reached]
    header += [f"{kind}_{measure}" for kind in ("final", "best", "last") for measure in results.measures]
    rows: list[Sequence[object]] = [header]
    for run in results.runs:
        plan = run.planned
        target = results.targets.get(plan.problem)
        rows.append(
            [
                *(plan.problem, plan.variant, plan.seed, plan.hash, run.state, run.reason),
                *(_whole(run.last(axis)) for axis in AXES),
                "yes" if run.shared else "no",
                *(None if target is None else _whole(run.reached(results.headline, target, axis)) for axis in AXES),
                *(run.final(measure) for measure in results.measures),
                *(run.best(measure) for measure in results.measures),
                *(run.latest(measure) for measure in results.measures),
            ]
        )
    return rows


def _final(results: Results) -> list[Sequence[object]]:
    header = "problem variant measure kind runs done diverged failed n mean std low high smallest largest"
    rows: list[Sequence[object]] = [header.split()]
    for cell in results.flat():
        counts = [len(cell.runs), *(cell.count(state) for state in ("done", "diverged", "failed"))]
        for measure in results.measures:
            for kind, s in (("final", cell.final[measure]), ("best", cell.best[measure])):
                numbers = [s.n, s.mean, s.std, s.low, s.high, s.smallest, s.largest]
                rows.append([cell.problem, cell.variant.name, measure, kind, *counts, *numbers])
    return rows


def _differences(results: Results) -> list[Sequence[object]]:
    header = "problem variant reference measure pairs pairs_lost mean std low high p p_holm verdict"
    rows: list[Sequence[object]] = [header.split()]
    for cell in results.flat():
        for measure, d in cell.differences.items():
            numbers = [d.n, d.lost, d.mean, d.std, d.low, d.high, d.p, cell.p[measure]]
            verdict = cell.verdict if measure == results.headline else None
            rows.append([cell.problem, cell.variant.name, results.study.reference, measure, *numbers, verdict])
    return rows


def _targets(results: Results) -> list[Sequence[object]]:
    header = "problem variant measure what goal unit runs reached median smallest largest"
    rows: list[Sequence[object]] = [header.split()]
    for cell in results.flat():
        if cell.problem not in results.targets:
            continue
        goal = results.targets[cell.problem]
        parts = (
            ("to the target", goal, cell.targets),
            ("to the reference's final value, share of the reference's", None, cell.catches),
            ("of the reference to this variant's final value, share of this variant's", None, cell.caught),
        )
        for what, value, by_axis in parts:
            for axis, t in by_axis.items():
                numbers = [t.n, t.reached, *(_whole(number) for number in (t.median, t.smallest, t.largest))]
                rows.append([cell.problem, cell.variant.name, results.headline, what, value, _UNITS[axis], *numbers])
    return rows


def _profile(results: Results) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = [["unit", "variant", "instances", "ratio", "share"]]
    for axis, profiles in results.profiles.items():
        for name, one in profiles.items():
            for ratio, share in zip(one.ratios, one.shares, strict=True):
                rows.append([_UNITS[axis], name, one.instances, ratio, share])
    return rows


def _whole(value: float | None) -> float | int | None:
    """Steps and cases without a decimal point."""
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else value


def _latex_final(results: Results) -> str:
    errors = [measure for measure in results.measures if measure.endswith("_error")] or list(results.measures[:1])
    shown = [results.headline, *(measure for measure in errors if measure != results.headline)][:4]
    rows = []
    for cell in results.flat():
        done = f"{cell.count('done')}/{len(cell.runs)}"
        values = [*(cell.final[measure] for measure in shown), cell.best[results.headline]]
        rows.append((cell.problem, [_name(cell), done, *(_math(plus_minus(value)) for value in values)]))
    header = ["Variant", "Runs", *(_escape(MEASURE_NAMES[m].capitalize()) for m in shown), "Best of the first"]
    note = "Final values: mean and sample standard deviation over the seeds that are done; runs: done of all."
    return _latex(results, header, rows, note)


def _latex_differences(results: Results) -> str:
    rows = []
    for cell in results.flat():
        d: Difference | None = cell.differences.get(results.headline)
        if d is not None:
            p = probability(cell.p[results.headline])
            lost = f" ({cell.lost} lost)" if cell.lost else ""
            numbers = [signed(d.mean), interval(d.low, d.high), p]
            rows.append((cell.problem, [_name(cell), f"{d.n}{lost}", *map(_math, numbers)]))
    header = ["Variant", "Pairs", "Difference", r"95\,\% interval", "$p$ (Holm)"]
    what = f"{MEASURE_NAMES[results.headline]}, variant minus {results.study.reference}, paired by seed"
    return _latex(results, header, rows, _escape(f"Final {what}; exact sign-flip test."))


def _latex_targets(results: Results) -> str:
    def cost(target: ToTarget | None) -> str:
        if target is None or not target.n:
            return "--"
        return "not reached" if target.median is None else _math(amount(target.median))

    rows = []
    for cell in results.flat():
        first = cell.targets.get("step")
        reached = "--" if first is None or not first.n else f"{first.reached}/{first.n}"
        rows.append((cell.problem, [_name(cell), reached, *(cost(cell.targets.get(axis)) for axis in AXES)]))
    goals = ", ".join(f"{amount(goal)} on {problem}" for problem, goal in results.targets.items())
    note = f"Median cost to the target ({MEASURE_NAMES[results.headline]}: {goals}); runs that never reached it count."
    if results.shared:
        note += " Seconds were measured on a machine shared with other runs."
    return _latex(results, ["Variant", "Reached", "Steps", "Cases", "Seconds"], rows, _escape(note))


def _latex(results: Results, header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], note: str) -> str:
    """A table with a row for each (problem, cells), under the problems' names if there are several."""
    lines = [
        f"% {_escape(results.study.name)}: written by kfac study report; needs the packages booktabs and graphicx",
        f"% {note}",
        r"\resizebox{\ifdim\width>\columnwidth\columnwidth\else\width\fi}{!}{%",  # shrunk where a column is narrower
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
    ]
    for problem in results.cells:
        own = [cells for name, cells in rows if name == problem]
        if own:
            lines.append(r"\midrule")
            if len(results.cells) > 1:
                lines.append(rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{_escape(problem)}}}}} \\")
            lines += [" & ".join(cells) + r" \\" for cells in own]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", ""])


def _name(cell: Cell) -> str:
    return _escape(cell.variant.name)


def _math(text: str) -> str:
    """Numbers in math mode, so that minus signs are minus signs."""
    if not text or text in (DASH, "--"):
        return "--"
    for character, command in ((MINUS, "-"), ("±", r"\pm"), ("∞", r"\infty")):
        text = text.replace(character, command)
    return f"${text}$"


def _escape(text: str) -> str:
    """Text in which LaTeX sees no commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {DASH: "--", MINUS: "$-$"}
    return "".join(special.get(character, character) for character in text)
