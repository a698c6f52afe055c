"""What a study found: every variant on every problem, compared with the reference. Imports no torch.

One measure is the study's headline (that of its target, otherwise the training error that runs report), and the others
are treated alike. A diverged or failed run has no final value: it is missing from means, and it is counted, named, and
keeps a variant from being called better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kfacore.lab.studies.plan import Study, Variant
from kfacore.lab.studies.report_data import AXES, MEASURES, RunData
from kfacore.lab.studies.statistics import (
    LEVEL,
    Difference,
    Profile,
    Summary,
    ToTarget,
    holm,
    paired_difference,
    performance_profile,
    smallest_p,
    summarise,
    to_target,
)

__all__ = ["ALPHA", "Cell", "Results", "Verdict", "analyse"]

ALPHA = 0.05
"""Level of the tests."""

Verdict = Literal["reference", "better", "worse", "maybe better", "maybe worse", "unclear", "few", "broken", "waiting"]
"""What a comparison comes to.

``better``, ``worse``: the 95 % interval of the paired difference leaves out 0, and that stands after the correction for
all comparisons: by the sign-flip test with Holm's correction where the number of seeds allows it to reject at all,
otherwise by the interval widened to 1 - 0.05 / m for m comparisons (Bonferroni). ``maybe ...``: the interval leaves out
0, but that does not stand. ``unclear``: the interval holds 0. ``few``: too few seeds for an interval. ``broken``: a run
of the variant or of the reference diverged or failed. ``waiting``: no pair is done yet.
"""


@dataclass(frozen=True)
class Cell:
    """One variant on one problem.

    Attributes:
        variant: The variant.
        problem: Name of the problem.
        runs: Its runs, by seed.
        final: Of each measure, the values of the last evaluation over the seeds that are done.
        best: The smallest values likewise.
        differences: Of each measure, the final value minus the reference's, paired by seed; empty for the reference.
        p: Of each measure, the p of the sign-flip test after Holm's correction over all comparisons of the study.
        verdict: What the headline measure says.
        targets: By axis, what it took to reach the problem's target; empty if there is no target.
        catches: By axis, the cost at which this variant first had the reference's final value, as a share of what the
            reference itself needed for it, paired by seed; empty for the reference.
        caught: The same the other way round: the reference reaching this variant's final value, as a share of what
            this variant needed.
    """

    variant: Variant
    problem: str
    runs: tuple[RunData, ...]
    final: Mapping[str, Summary]
    best: Mapping[str, Summary]
    differences: Mapping[str, Difference]
    p: Mapping[str, float | None]
    verdict: Verdict
    targets: Mapping[str, ToTarget]
    catches: Mapping[str, ToTarget]
    caught: Mapping[str, ToTarget]

    def count(self, state: str) -> int:
        """Runs in a state."""
        return sum(run.state == state for run in self.runs)

    @property
    def lost(self) -> int:
        """Runs that diverged or failed."""
        return self.count("diverged") + self.count("failed")


@dataclass(frozen=True)
class Results:
    """Everything a report says.

    Attributes:
        study: The study.
        runs: All runs.
        measures: The measures that any run has, the headline first.
        headline: The measure that verdicts, targets and profiles are about.
        cells: By problem, the variants: the reference first, the others in the order of the study.
        targets: By problem, the value to be reached; missing where there is none.
        target_from_reference: Whether the targets are the reference's own (the study names none).
        profiles: By axis, the performance profile of each variant over all problems and seeds; empty without targets.
        comparisons: Number of comparisons that the widened intervals count: those with an interval.
        tests: Number of comparisons that Holm's correction counts: those with a p.
        tested: Whether verdicts rest on the sign-flip test where there is one: it can reject with this number of seeds.
    """

    study: Study
    runs: tuple[RunData, ...]
    measures: tuple[str, ...]
    headline: str
    cells: Mapping[str, tuple[Cell, ...]]
    targets: Mapping[str, float]
    target_from_reference: bool
    profiles: Mapping[str, Mapping[str, Profile]]
    comparisons: int
    tests: int
    tested: bool

    @property
    def pairs(self) -> int:
        """The largest number of pairs of any comparison in the headline measure."""
        return max((d.n for d in (c.differences.get(self.headline) for c in self.flat()) if d is not None), default=0)

    @property
    def smallest_p(self) -> float:
        """The smallest corrected p that the study could give."""
        return smallest_p(self.pairs, max(1, self.tests))

    def flat(self) -> tuple[Cell, ...]:
        """All cells."""
        return tuple(cell for cells in self.cells.values() for cell in cells)

    def reference(self, problem: str) -> Cell:
        """The reference on a problem."""
        return self.cells[problem][0]

    @property
    def shared(self) -> bool:
        """Whether any wall time was taken on a machine shared with other runs of the study."""
        return any(run.shared for run in self.runs)


def analyse(study: Study, runs: Sequence[RunData]) -> Results:
    """Draw the conclusions.

    Args:
        study: The study.
        runs: Its runs as read.

    Returns:
        The results.
    """
    headline = _headline(study, runs)
    present = [measure for measure in MEASURES if any(_measured(run, measure) for run in runs)]
    measures = (headline, *(measure for measure in present if measure != headline))
    groups = _groups(study, runs)
    targets, from_reference = _targets(study, headline, groups)
    differences = {
        (problem, variant.name, measure): _difference(own, members[0][1], measure)
        for problem, members in groups.items()
        for variant, own in members[1:]
        for measure in measures
    }
    p: dict[tuple[str, str, str], float | None] = {}
    for measure in measures:  # a family of comparisons for each measure
        keys = [key for key in differences if key[2] == measure]
        p.update(zip(keys, holm([differences[key].p for key in keys]), strict=True))
    compared = [difference for key, difference in differences.items() if key[2] == headline]
    comparisons = sum(difference.low is not None for difference in compared)
    pairs = [difference.n for difference in compared if difference.p is not None]
    tested = bool(pairs) and smallest_p(max(pairs), len(pairs)) <= ALPHA
    level = 1.0 - ALPHA / max(1, comparisons)
    cells = {
        problem: tuple(
            _cell(
                problem,
                variant,
                own,
                members[0][1] if position else None,
                headline,
                measures,
                targets.get(problem),
                differences,
                p,
                tested,
                level,
            )
            for position, (variant, own) in enumerate(members)
        )
        for problem, members in groups.items()
    }
    return Results(
        study=study,
        runs=tuple(runs),
        measures=measures,
        headline=headline,
        cells=cells,
        targets=targets,
        target_from_reference=from_reference,
        profiles=_profiles(study, groups, headline, targets),
        comparisons=comparisons,
        tests=len(pairs),
        tested=tested,
    )


def _groups(study: Study, runs: Sequence[RunData]) -> dict[str, list[tuple[Variant, tuple[RunData, ...]]]]:
    """The runs of each variant on each problem, by seed; the reference first."""
    groups: dict[str, list[tuple[Variant, tuple[RunData, ...]]]] = {}
    order = sorted(study.variants, key=lambda variant: variant.name != study.reference)  # stable: reference first
    for problem in study.problems:
        for variant in order:
            own = [run for run in runs if (run.planned.problem, run.planned.variant) == (problem, variant.name)]
            if own or variant.name == study.reference:  # nobody else takes the place of a reference that has no runs
                groups.setdefault(problem, []).append((variant, tuple(sorted(own, key=lambda run: run.seed))))
        if not any(own for _, own in groups.get(problem, ())):
            groups.pop(problem, None)
    return groups


def _measured(run: RunData, measure: str) -> bool:
    return bool((run.evals[measure] == run.evals[measure]).any())


def _headline(study: Study, runs: Sequence[RunData]) -> str:
    if study.target is not None and study.target.measure in MEASURES:
        return study.target.measure
    averaged = any(_measured(run, "averaged_train_error") for run in runs)
    return "averaged_train_error" if averaged else "train_error"


def _targets(
    study: Study, headline: str, groups: Mapping[str, Sequence[tuple[Variant, tuple[RunData, ...]]]]
) -> tuple[dict[str, float], bool]:
    """The study's target, or for each problem the worst final value of the reference's finished runs."""
    if study.target is not None:
        return dict.fromkeys(groups, study.target.value), False
    targets = {}
    for problem, members in groups.items():
        largest = summarise([run.final(headline) for run in members[0][1]]).largest
        if largest is not None:
            targets[problem] = largest
    return targets, True


def _difference(own: Sequence[RunData], reference: Sequence[RunData], measure: str, level: float = LEVEL) -> Difference:
    return paired_difference(
        {run.seed: run.final(measure) for run in own}, {run.seed: run.final(measure) for run in reference}, level
    )


def _cell(
    problem: str,
    variant: Variant,
    own: tuple[RunData, ...],
    reference: tuple[RunData, ...] | None,  # None for the reference itself
    headline: str,
    measures: Sequence[str],
    target: float | None,
    differences: Mapping[tuple[str, str, str], Difference],
    p: Mapping[tuple[str, str, str], float | None],
    tested: bool,
    level: float,
) -> Cell:
    mine = {m: differences[problem, variant.name, m] for m in measures} if reference is not None else {}
    corrected = {m: p[problem, variant.name, m] for m in mine}
    return Cell(
        variant=variant,
        problem=problem,
        runs=own,
        final={m: summarise([run.final(m) for run in own]) for m in measures},
        best={m: summarise([run.best(m) for run in own]) for m in measures},
        differences=mine,
        p=corrected,
        verdict="reference"
        if reference is None
        else _verdict(
            (*own, *reference),
            mine[headline],
            corrected[headline] if tested else None,
            _difference(own, reference, headline, level),
        ),
        targets={} if target is None else {axis: _to_target(own, headline, target, axis) for axis in AXES},
        catches={} if reference is None else {axis: _shares(own, reference, headline, axis) for axis in AXES},
        caught={} if reference is None else {axis: _shares(reference, own, headline, axis) for axis in AXES},
    )


def _verdict(both: Sequence[RunData], difference: Difference, p: float | None, widened: Difference) -> Verdict:
    """Of a variant against the reference: by the test where it has a p that could reject, else by the interval."""
    if any(run.state in ("diverged", "failed") for run in both):
        return "broken"
    if difference.n == 0 or difference.mean is None:
        return "waiting"
    if difference.low is None or difference.high is None:
        return "few"
    if _holds_zero(difference):
        return "unclear"
    confirmed = not _holds_zero(widened) if p is None else p <= ALPHA
    if difference.mean < 0.0:
        return "better" if confirmed else "maybe better"
    return "worse" if confirmed else "maybe worse"


def _holds_zero(difference: Difference) -> bool:
    return difference.low is None or difference.high is None or difference.low <= 0.0 <= difference.high


def _to_target(runs: Sequence[RunData], measure: str, target: float, axis: str) -> ToTarget:
    """Runs that have not begun know nothing about the target and are left out; all others count."""
    costs, reached = [], []
    for run in runs:
        at = run.reached(measure, target, axis)
        if at is None and run.state == "pending" and not run.last("step"):
            continue
        costs.append(run.spent(axis) if at is None else at)
        reached.append(at is not None)
    return to_target(costs, reached)


def _shares(runs: Sequence[RunData], others: Sequence[RunData], measure: str, axis: str) -> ToTarget:
    """For each seed: cost at which a run first has the other's final value, over what the other needed for it."""
    by_seed = {run.seed: run for run in others}
    costs, reached = [], []
    for run in runs:
        other = by_seed.get(run.seed)
        goal = None if other is None else other.final(measure)
        if other is None or goal is None or (run.state == "pending" and not run.last("step")):
            continue
        theirs = other.reached(measure, goal, axis)
        if theirs is None or theirs <= 0.0:
            continue
        at = run.reached(measure, goal, axis)
        costs.append((run.spent(axis) if at is None else at) / theirs)
        reached.append(at is not None)
    return to_target(costs, reached)


def _profiles(
    study: Study,
    groups: Mapping[str, Sequence[tuple[Variant, tuple[RunData, ...]]]],
    headline: str,
    targets: Mapping[str, float],
) -> dict[str, dict[str, Profile]]:
    """Instances are the pairs of problem and seed for which every variant that has runs has one that has ended."""
    table: dict[tuple[str, int], dict[str, RunData]] = {}
    for problem, members in groups.items():
        if problem in targets:
            for variant, own in members:
                for run in own:
                    if run.state in ("done", "diverged", "failed"):
                        table.setdefault((problem, run.seed), {})[variant.name] = run
    planned = {variant.name for members in groups.values() for variant, own in members if own}
    names = [variant.name for variant in study.variants if variant.name in planned]
    complete = {key: row for key, row in table.items() if len(row) == len(names)}
    if not complete or len(names) < 2:
        return {}

    def cost(axis: str) -> Callable[[tuple[str, int], str], float]:
        def of(key: tuple[str, int], name: str) -> float:
            at = complete[key][name].reached(headline, targets[key[0]], axis)
            return math.inf if at is None else at

        return of

    return {
        axis: performance_profile({name: [cost(axis)(key, name) for key in sorted(complete)] for name in names})
        for axis in AXES
    }
