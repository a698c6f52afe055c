"""What the records say: a row for each problem, and what they come to together.

A ratio is (K-FAC's loss + floor) / (the other's loss + floor) at the end, each loss a median over seeds, the other's
that of its best learning rate on this problem, and the floor a thousandth of the first loss: below it nobody needs to
win. A run that has failed counts with an infinite loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.robust.contenders import FAMILIES, family
from benchmarks.robust.race import Record

__all__ = ["rows", "standing", "strangers", "summary"]

FLOOR = 1e-3
CLOSE = 1.5
RIVALS = [name for name in FAMILIES if name != "kfac"]


def rows(records: Iterable[Record], contender: str) -> list[dict[str, Any]]:
    """Of one kind of K-FAC, on each problem: runs diverged, steps, and ratios of training and test loss."""
    by_problem: dict[str, list[Record]] = {}
    for record in records:
        by_problem.setdefault(record["problem"], []).append(record)
    found = {problem: [run for run in runs if run["contender"] == contender] for problem, runs in by_problem.items()}
    return [_row(problem, runs, by_problem[problem]) for problem, runs in found.items() if runs]


def _row(problem: str, runs: list[Record], records: list[Record]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "": problem,
        "diverged": f"{sum(run['diverged'] for run in runs)}/{len(runs)}",
        "steps": round(median(run["steps"] for run in runs)),
        "undone": sum(run["rejected"] for run in runs),
        "first": median(run["first"] for run in runs),
        "final": _median(runs, "final"),
    }
    for rival in RIVALS:
        row[f"/ {rival}"] = _ratio(runs, rival, records, "final", "first")
    for rival in RIVALS:
        row[f"test / {rival}"] = _ratio(runs, rival, records, "final_test", "first_test")
    return row


def _ratio(mine: list[Record], rival: str, records: list[Record], loss: str, first: str) -> float | None:
    """None where the rival did not run; only seeds that all of them ran count."""
    theirs: dict[str, list[Record]] = {}
    for record in records:
        if family(record["contender"]) == rival:
            theirs.setdefault(record["contender"], []).append(record)
    seeds = {run["seed"] for run in mine}.intersection(*({run["seed"] for run in runs} for runs in theirs.values()))
    if not theirs or not seeds:
        return None
    mine = [run for run in mine if run["seed"] in seeds]
    best = min(_median([run for run in runs if run["seed"] in seeds], loss) for runs in theirs.values())
    floor = FLOOR * median(run[first] for run in mine)
    over, under = _median(mine, loss) + floor, best + floor
    return over / under if math.isfinite(over) else math.inf


def _median(runs: list[Record], loss: str) -> float:
    """Infinite for the runs that failed or ended without a number."""
    found = [run[loss] if run["error"] is None and math.isfinite(run[loss]) else math.inf for run in runs]
    return median(found) if found else math.nan


def summary(records: Iterable[Record], contender: str) -> dict[str, Any]:
    """Of one contender: runs, those diverged and why."""
    runs = [record for record in records if record["contender"] == contender]
    line: dict[str, Any] = {"": contender, "runs": len(runs), "diverged": sum(run["diverged"] for run in runs)}
    for verdict in ("nan", "doubled", "rose", "batches_rose", "whole_rose"):
        line[verdict] = sum(run[verdict] for run in runs)
    line["failed"] = sum(run["error"] is not None for run in runs)
    line["undone"] = sum(run["rejected"] for run in runs)
    return line


def standing(records: Iterable[Record], contender: str) -> list[dict[str, Any]]:
    """Of one kind of K-FAC, against each rival: on how many problems it keeps up, and on how many it is ahead."""
    table = rows(records, contender)
    lines = []
    for column in (f"{test}/ {rival}" for test in ("", "test ") for rival in RIVALS):
        ratios = [row[column] for row in table if row[column] is not None]
        if ratios:
            close, ahead = sum(ratio <= CLOSE for ratio in ratios), sum(ratio < 1 for ratio in ratios)
            ratio = {f"<= {CLOSE:g}": close, "< 1": ahead, "median": median(ratios), "largest": max(ratios)}
            lines.append({"": f"{contender} {column}", "problems": len(ratios), **ratio})
    return lines


def strangers(records: Iterable[Record]) -> list[str]:
    """Problems whose runs of one seed did not begin with the same loss: records of different recipes or machines."""
    firsts: dict[tuple[str, int], list[float]] = {}
    for record in records:
        firsts.setdefault((record["problem"], record["seed"]), []).append(record["first"])
    return sorted({problem for (problem, _), found in firsts.items() if max(found) > 1.0001 * min(found)})
