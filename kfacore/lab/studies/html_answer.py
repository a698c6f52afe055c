"""The first screen of a report: what was compared, what came out, and what that is worth. Imports no torch."""

from __future__ import annotations

from html import escape

from kfacore.lab.studies.figures import Pen, pens
from kfacore.lab.studies.html import cell, swatch, table
from kfacore.lab.studies.report_limits import limits
from kfacore.lab.studies.report_results import ALPHA, Cell, Results, Verdict
from kfacore.lab.studies.statistics import MIN_INTERVAL, Difference, ToTarget, summarise
from kfacore.lab.studies.tables import MEASURE_NAMES, amount, counted, interval, plus_minus, probability, signed

__all__ = ["answer", "facts", "lost_runs", "share", "time_text"]

_WORDS: dict[Verdict, str] = {
    "reference": "reference",
    "better": "better",
    "worse": "worse",
    "maybe better": "better, not confirmed",
    "maybe worse": "worse, not confirmed",
    "unclear": "no clear difference",
    "few": "too few seeds",
    "broken": "runs lost",
    "waiting": "no result yet",
}
_LINES: tuple[tuple[Verdict, str], ...] = (
    ("better", "Better"),
    ("maybe better", "Perhaps better (not confirmed)"),
    ("worse", "Worse"),
    ("maybe worse", "Perhaps worse (not confirmed)"),
    ("unclear", "No clear difference"),
    ("few", "Differences without an interval"),
    ("broken", "Lost runs"),
    ("waiting", "No result yet"),
)


def facts(results: Results) -> str:
    """One line: the size of the study, how far it is, what is measured."""
    study = results.study
    counts = {state: sum(run.state == state for run in results.runs) for state in ("done", "diverged", "failed")}
    states = f"{counts['done']} of {len(results.runs)} runs done"
    for state in ("diverged", "failed"):
        if counts[state]:
            states += f', <strong class="broken">{counts[state]} {state}</strong>'
    waiting = len(results.runs) - sum(counts.values())
    if waiting:
        states += f', <strong class="waiting">{waiting} not finished</strong>'
    size = [
        counted(len(study.variants), "variant"),
        counted(len(study.problems), "problem"),
        counted(len(study.seeds), "seed"),
    ]
    sizes = " \N{MULTIPLICATION SIGN} ".join(size)  # no escape fits into an f-string before Python 3.12
    return (
        f'<p class="facts">{sizes} · {states} · measure: {escape(MEASURE_NAMES[results.headline])} at the '
        f"last evaluation, smaller is better</p>"
    )


def answer(results: Results) -> str:
    """The verdicts in sentences, then in one table a problem."""
    styles = pens(results)
    sentences = "".join(_sentences(results, problem) for problem in results.cells)
    notes = "".join(f"<p>{escape(text)}</p>" for text in limits(results))
    box = f'<section class="answer" id="answer"><h2>Answer</h2>{sentences}</section>'
    tables = "".join(_table(results, problem, styles) for problem in results.cells)
    warning = f'<div class="warning">{notes}</div>' if notes else ""
    return f"{box}{warning}{tables}{_key(results)}"


def lost_runs(results: Results) -> str:
    """Every run that is not done, with its reason and how far it came; nothing if all are."""
    lost = [run for run in results.runs if not run.done]
    if not lost:
        return ""
    header = [
        cell("Run", head="col"),
        *(cell(h, head="col") for h in ("State", "Seed", "Steps", "Best value", "Last value")),
    ]
    header.append(cell("Reason", "text", head="col"))
    rows = []
    for run in lost:
        plan = run.planned
        style = "broken" if run.state in ("diverged", "failed") else "waiting"
        name = plan.variant if len(results.cells) == 1 else f"{plan.variant}, {plan.problem}"
        rows.append(
            f"<tr>{cell(escape(name), head='row')}{cell(run.state, style)}{cell(str(run.seed))}"
            f"{cell(amount(run.last('step'), 6))}{cell(amount(run.smallest(results.headline)))}"
            f"{cell(amount(run.latest(results.headline)))}"
            f"{cell(escape(run.reason) or ('has not begun' if not run.config else 'not finished'), 'wrap')}</tr>"
        )
    note = (
        "They are counted everywhere and enter no mean. Their numbers stand here, and the figures show them up to "
        "where they got. A run that ends far above its first training loss, or above twice its best, has diverged."
    )
    return f'<section><h2 id="lost">Runs that are not done</h2><p>{note}</p>{table("Runs", header, rows)}</section>'


def time_text(target: ToTarget | None, unit: str = "") -> str:
    """The median cost to a target, with how many runs reached it where not all did."""
    if target is None or not target.n:
        return amount(None)
    if target.median is None:
        return f"not reached ({target.reached}/{target.n})"
    reached = "" if target.reached == target.n else f" ({target.reached}/{target.n})"
    return f"{amount(target.median, 3)}{unit}{reached}"


def share(target: ToTarget | None) -> str:
    """A share of another run's cost: percent below 2, otherwise times."""
    if target is None or not target.n or target.median is None:
        return time_text(target)
    reached = "" if target.reached == target.n else f" ({target.reached}/{target.n})"
    value = f"{100.0 * target.median:.3g} %" if target.median < 2.0 else f"{target.median:.3g} times"
    return f"{value}{reached}"


def _sentences(results: Results, problem: str) -> str:
    cells = results.cells[problem]
    reference = cells[0]
    title = f"<h3>{escape(problem)}</h3>" if len(results.cells) > 1 else ""
    mean = reference.final[results.headline]
    known = f"{plus_minus(mean)} over {counted(mean.n, 'seed')}" if mean.n else "no result yet"
    lost = f', <span class="broken">{_lost(reference)}</span>' if reference.lost else ""
    items = [f'Reference <span class="name">{escape(reference.variant.name)}</span>: {known}{lost}.']
    for verdict, title_of in _LINES:
        own = [one for one in cells[1:] if one.verdict == verdict]
        if own:
            own.sort(key=lambda one: -abs(one.differences[results.headline].mean or 0.0))
            listed = "; ".join(_mention(results, one) for one in own)
            style = verdict.split()[0]
            items.append(f'<span class="tag {style}">{title_of}:</span> {listed}.')
    unreached = _unreached(results, problem)
    if unreached:
        items.append(unreached)
    return f"{title}<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _mention(results: Results, one: Cell) -> str:
    """A variant in a sentence: its difference, and how large that is relative to the reference."""
    name = f'<span class="name">{escape(one.variant.name)}</span>'
    if one.verdict == "waiting":
        return name
    difference = one.differences[results.headline]
    text = _lost_text(results, one) if one.verdict == "broken" else ""
    if difference.mean is not None:
        base = _paired_base(results, one)
        ratio = 1.0 + difference.mean / base if base else 1.0
        relative = f", {ratio:.3g} times" if ratio >= 2.0 else f", {signed(100.0 * (ratio - 1.0), 2)} %" if base else ""
        text += f"{'; in the others ' if text else ''}{signed(difference.mean)}{relative}"
    return f"{name} ({text})"


def _unreached(results: Results, problem: str) -> str:
    """That nobody reached the target. Who was fastest is not said: a median of few seeds has no interval to go by."""
    if problem not in results.targets:
        return ""
    if any(one.targets["seconds"].median is not None for one in results.cells[problem]):
        return ""
    return f"No variant reached {amount(results.targets[problem])} in more than half of its runs."


def _table(results: Results, problem: str, styles: dict[str, Pen]) -> str:
    cells = results.cells[problem]
    mark = "†" if results.shared else ""
    header = [
        cell("Variant", head="col"),
        cell("Verdict", "text", head="col"),  # second, so that a telephone shows it
        cell("Final value", head="col"),
        cell("Difference", head="col"),
        cell("95 % interval", head="col"),
        cell("p (Holm)", head="col"),
        cell("Runs", head="col"),
    ]
    goal = results.targets.get(problem)
    if goal is not None:
        header.append(cell(f"Seconds to {amount(goal, 3)}{mark}", head="col"))
    rows = []
    for one in cells:
        pen = styles[one.variant.name]
        d = one.differences.get(results.headline)
        done = f"{one.count('done')}/{len(one.runs)}"
        parts = [
            cell(f"{swatch(pen)}{escape(one.variant.name)}", head="row"),
            cell(_lost_text(results, one) or _WORDS[one.verdict], "text", one.verdict.split()[0]),
            cell(plus_minus(one.final[results.headline])),
            cell("" if d is None else f"{signed(d.mean)}{_pairs(results, d)}"),
            cell("" if d is None else interval(d.low, d.high)),
            cell("" if d is None else probability(one.p[results.headline])),
            cell(done, *(["broken"] if one.lost else [])),
        ]
        if goal is not None:
            parts.append(cell(time_text(one.targets.get("seconds"))))
        style = ' class="reference"' if d is None else ""
        rows.append(f"<tr{style}>{''.join(parts)}</tr>")
    where = f" on {problem}" if len(results.cells) > 1 else ""
    return table(f"{MEASURE_NAMES[results.headline].capitalize()}{where}: mean ± standard deviation", header, rows)


def _key(results: Results) -> str:
    """How to read the table, in one paragraph."""
    text = "Runs: done of all. Difference: variant minus reference, paired by seed."
    if len(results.study.seeds) >= MIN_INTERVAL:
        text += " Interval: Student's t for the mean difference, not adjusted for the number of comparisons."
    if any(one.p.get(results.headline) is not None for one in results.flat()):
        text += f" p: exact sign-flip test, after Holm's correction for {counted(results.tests, 'comparison')}."
    compared = [one for one in results.flat() if one.differences]
    by_test = [one for one in compared if results.tested and one.p[results.headline] is not None]
    widened = 100.0 * (1.0 - ALPHA / max(1, results.comparisons))
    if by_test and len(by_test) == sum(one.differences[results.headline].low is not None for one in compared):
        text += f" Better and worse: the interval leaves out 0 and p ≤ {ALPHA:g}."
    elif by_test:
        text += (
            f" Better and worse: the interval leaves out 0, and p ≤ {ALPHA:g}, or, where there is no p, the interval "
            f"at {widened:.6g} % confidence does as well."
        )
    elif results.comparisons:
        text += f" Better and worse: the interval leaves out 0, also at {widened:.6g} % confidence."
    if results.targets:
        source = "the worst final value of the reference" if results.target_from_reference else "the study's target"
        text += f" Seconds: median over seeds to {source}, with runs that never got there counted as such."
    if results.shared:
        text += (
            " † Other runs of this study used the machine at the same time: do not compare these wall times closely."
        )
    return f'<p class="note">{escape(text)}</p>'


def _lost_text(results: Results, one: Cell) -> str:
    """Which runs of a comparison are lost: the variant's, the reference's; nothing if none are."""
    reference = results.reference(one.problem)
    parts = [_lost(one)] if one.lost else []
    if one is not reference and reference.lost:
        parts.append(f"reference: {_lost(reference)}")
    return "; ".join(parts)


def _paired_base(results: Results, one: Cell) -> float | None:
    """Mean of the reference over the seeds that the variant has a value for too: what a percentage is of."""
    own = {run.seed for run in one.runs if run.final(results.headline) is not None}
    base = [run.final(results.headline) for run in results.reference(one.problem).runs if run.seed in own]
    return summarise(base).mean


def _pairs(results: Results, difference: Difference) -> str:
    """How many pairs a difference rests on, where it is not all seeds."""
    if difference.n == len(results.study.seeds) or not difference.n:
        return ""
    return f" ({counted(difference.n, 'pair')})"


def _lost(one: Cell) -> str:
    parts = [f"{one.count(state)} of {len(one.runs)} {state}" for state in ("diverged", "failed") if one.count(state)]
    return ", ".join(parts)
