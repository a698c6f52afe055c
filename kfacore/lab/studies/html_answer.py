"""The first screen of a report: what was compared, what came out, and what that is worth. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfacore.lab.studies.html import Cell, Row, Stroke, Table, heads
from kfacore.lab.studies.report_results import ALPHA, Results, Verdict
from kfacore.lab.studies.report_results import Cell as Comparison
from kfacore.lab.studies.statistics import MIN_INTERVAL, Difference, ToTarget, summarise
from kfacore.lab.studies.tables import MEASURE_NAMES, amount, counted, interval, plus_minus, probability, signed

__all__ = ["answers", "facts", "key", "lost_runs", "share", "time_text", "verdicts"]

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


@dataclass(frozen=True)
class Facts:
    """One line: the size of the study, how far it is, what is measured.

    Attributes:
        sizes: Variants, problems, seeds.
        done: How many runs are done.
        rest: Of the others, a class and what became of them.
        measure: What is compared.
    """

    sizes: str
    done: str
    rest: Sequence[tuple[str, str]]
    measure: str


@dataclass(frozen=True)
class Line:
    """Variants with one verdict: its class, its words, and each variant's name with what is said of it."""

    style: str
    title: str
    mentions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """The verdicts on one problem in sentences.

    Attributes:
        title: The problem, if there are several.
        reference: Name of the reference.
        known: Its value.
        lost: Which of its runs are lost.
        lines: The other variants.
        unreached: That nobody reached the target, if so.
    """

    title: str
    reference: str
    known: str
    lost: str
    lines: Sequence[Line]
    unreached: str


def facts(results: Results) -> Facts:
    """What the study is and how far."""
    study = results.study
    counts = {state: sum(run.state == state for run in results.runs) for state in ("done", "diverged", "failed")}
    rest = [("broken", f"{counts[state]} {state}") for state in ("diverged", "failed") if counts[state]]
    waiting = len(results.runs) - sum(counts.values())
    if waiting:
        rest.append(("waiting", f"{waiting} not finished"))
    size = [
        counted(len(study.variants), "variant"),
        counted(len(study.problems), "problem"),
        counted(len(study.seeds), "seed"),
    ]
    done = f"{counts['done']} of {len(results.runs)} runs done"
    return Facts(" \N{MULTIPLICATION SIGN} ".join(size), done, rest, MEASURE_NAMES[results.headline])


def answers(results: Results) -> list[Answer]:
    """The verdicts in sentences, problem by problem."""
    return [_answer(results, problem) for problem in results.cells]


def verdicts(results: Results, pens: Mapping[str, Stroke]) -> list[Table]:
    """The verdicts in one table a problem."""
    return [_table(results, problem, pens) for problem in results.cells]


def lost_runs(results: Results) -> Table | None:
    """Every run that is not done, with its reason and how far it came; None if all are."""
    lost = [run for run in results.runs if not run.done]
    if not lost:
        return None
    header = [*heads("Run", "State", "Seed", "Steps", "Best value", "Last value"), Cell("Reason", "text", "col")]
    rows = []
    for run in lost:
        plan = run.planned
        style = "broken" if run.state in ("diverged", "failed") else "waiting"
        name = plan.variant if len(results.cells) == 1 else f"{plan.variant}, {plan.problem}"
        cells = [
            Cell(name, head="row"),
            Cell(run.state, style),
            Cell(str(run.seed)),
            Cell(amount(run.last("step"), 6)),
            Cell(amount(run.smallest(results.headline))),
            Cell(amount(run.latest(results.headline))),
            Cell(run.reason or ("has not begun" if not run.config else "not finished"), "wrap"),
        ]
        rows.append(Row(cells))
    return Table("Runs", header, rows)


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


def _answer(results: Results, problem: str) -> Answer:
    cells = results.cells[problem]
    reference = cells[0]
    mean = reference.final[results.headline]
    lines = []
    for verdict, title in _LINES:
        own = [one for one in cells[1:] if one.verdict == verdict]
        if own:
            own.sort(key=lambda one: -abs(one.differences[results.headline].mean or 0.0))
            mentions = [(one.variant.name, _mention(results, one)) for one in own]
            lines.append(Line(verdict.split()[0], title, mentions))
    return Answer(
        title=problem if len(results.cells) > 1 else "",
        reference=reference.variant.name,
        known=f"{plus_minus(mean)} over {counted(mean.n, 'seed')}" if mean.n else "no result yet",
        lost=_lost(reference) if reference.lost else "",
        lines=lines,
        unreached=_unreached(results, problem),
    )


def _mention(results: Results, one: Comparison) -> str:
    """What is said of a variant: its difference, and how large that is relative to the reference."""
    if one.verdict == "waiting":
        return ""
    difference = one.differences[results.headline]
    text = _lost_text(results, one) if one.verdict == "broken" else ""
    if difference.mean is not None:
        base = _paired_base(results, one)
        ratio = 1.0 + difference.mean / base if base else 1.0
        relative = f", {ratio:.3g} times" if ratio >= 2.0 else f", {signed(100.0 * (ratio - 1.0), 2)} %" if base else ""
        text += f"{'; in the others ' if text else ''}{signed(difference.mean)}{relative}"
    return text


def _unreached(results: Results, problem: str) -> str:
    """That nobody reached the target. Who was fastest is not said: a median of few seeds has no interval to go by."""
    if problem not in results.targets:
        return ""
    if any(one.targets["seconds"].median is not None for one in results.cells[problem]):
        return ""
    return f"No variant reached {amount(results.targets[problem])} in more than half of its runs."


def _table(results: Results, problem: str, pens: Mapping[str, Stroke]) -> Table:
    cells = results.cells[problem]
    header = [
        *heads("Variant"),
        Cell("Verdict", "text", "col"),  # second, so that a telephone shows it
        *heads("Final value", "Difference", "95 % interval", "p (Holm)", "Runs"),
    ]
    goal = results.targets.get(problem)
    if goal is not None:
        header += heads(f"Seconds to {amount(goal, 3)}{'†' if results.shared else ''}")
    rows = []
    for one in cells:
        d = one.differences.get(results.headline)
        parts = [
            Cell(one.variant.name, head="row", pen=pens[one.variant.name]),
            Cell(_lost_text(results, one) or _WORDS[one.verdict], f"text {one.verdict.split()[0]}"),
            Cell(plus_minus(one.final[results.headline])),
            Cell("" if d is None else f"{signed(d.mean)}{_pairs(results, d)}"),
            Cell("" if d is None else interval(d.low, d.high)),
            Cell("" if d is None else probability(one.p[results.headline])),
            Cell(f"{one.count('done')}/{len(one.runs)}", "broken" if one.lost else ""),
        ]
        if goal is not None:
            parts.append(Cell(time_text(one.targets.get("seconds"))))
        rows.append(Row(parts, "reference" if d is None else ""))
    where = f" on {problem}" if len(results.cells) > 1 else ""
    return Table(f"{MEASURE_NAMES[results.headline].capitalize()}{where}: mean ± standard deviation", header, rows)


def key(results: Results) -> str:
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
    return text


def _lost_text(results: Results, one: Comparison) -> str:
    """Which runs of a comparison are lost: the variant's, the reference's; nothing if none are."""
    reference = results.reference(one.problem)
    parts = [_lost(one)] if one.lost else []
    if one is not reference and reference.lost:
        parts.append(f"reference: {_lost(reference)}")
    return "; ".join(parts)


def _paired_base(results: Results, one: Comparison) -> float | None:
    """Mean of the reference over the seeds that the variant has a value for too: what a percentage is of."""
    own = {run.seed for run in one.runs if run.final(results.headline) is not None}
    base = [run.final(results.headline) for run in results.reference(one.problem).runs if run.seed in own]
    return summarise(base).mean


def _pairs(results: Results, difference: Difference) -> str:
    """How many pairs a difference rests on, where it is not all seeds."""
    if difference.n == len(results.study.seeds) or not difference.n:
        return ""
    return f" ({counted(difference.n, 'pair')})"


def _lost(one: Comparison) -> str:
    parts = [f"{one.count(state)} of {len(one.runs)} {state}" for state in ("diverged", "failed") if one.count(state)]
    return ", ".join(parts)
