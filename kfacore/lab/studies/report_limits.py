"""What the numbers of a study cannot say: too few seeds, comparisons without a partner. Imports no torch."""

from __future__ import annotations

from kfacore.lab.studies.report_results import ALPHA, Results
from kfacore.lab.studies.statistics import MAX_TEST, MIN_INTERVAL, MIN_TEST, smallest_p
from kfacore.lab.studies.tables import counted

__all__ = ["limits"]


def limits(results: Results) -> list[str]:
    """What the numbers of the study cannot say, in sentences.

    Args:
        results: The results.

    Returns:
        One sentence a limit, the weightiest first; empty if there is none.
    """
    found = []
    pairs, study = results.pairs, results.study
    for problem, cells in results.cells.items():
        if not cells[0].runs:
            where = f" on {problem}" if len(results.cells) > 1 else ""
            found.append(
                f"The reference {study.reference} has no runs yet{where} (its tuning is not decided, or none of it "
                "succeeded), so nothing is compared with it."
            )
    missing = [v.name for v in study.variants if not any(run.planned.variant == v.name for run in results.runs)]
    if results.profiles and missing:
        found.append(f"The performance profiles leave out {', '.join(missing)}, without runs yet.")
    if len(study.seeds) < MIN_INTERVAL:
        found.append(
            f"{counted(len(study.seeds), 'seed')}: no intervals and no tests. Differences may be the luck of the draw; "
            f"run at least {MIN_INTERVAL} seeds for intervals and {MIN_TEST} for the test."
        )
    elif len(study.seeds) < MIN_TEST:
        found.append(
            f"{counted(len(study.seeds), 'seed')}: intervals, but no sign-flip test, which needs {MIN_TEST}. The "
            "verdicts rest on t-intervals, widened for the number of comparisons."
        )
    elif results.tests and not results.tested:
        found.append(
            f"With {counted(pairs, 'pair')} and {counted(results.tests, 'test')} the smallest possible p of the exact "
            f"test after Holm's correction is {results.smallest_p:.2g}, so it can confirm nothing here; "
            f"{_needed(results.tests)} pairs would be enough. The verdicts rest on t-intervals, widened for the "
            "number of comparisons."
        )
    if pairs > MAX_TEST:
        found.append(
            f"The sign-flip test is not computed for more than {MAX_TEST} pairs; those verdicts rest on t-intervals, "
            "widened for the number of comparisons."
        )
    return found


def _needed(comparisons: int) -> int:
    n = MIN_TEST
    while smallest_p(n, comparisons) > ALPHA:
        n += 1
    return n
