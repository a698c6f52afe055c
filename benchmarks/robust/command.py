"""Training that nobody tuned for: does K-FAC with nothing set ever fall apart, and does it keep up with the others?

Every run is a problem with a seed, an optimizer, and the same processor seconds on one thread. Adam, Muon and SOAP run
with several learning rates, of which the best on each problem counts. K-FAC is rerun often and the others never change,
so their runs of an earlier file can be taken with --baseline. Where other work would disturb the seconds, --pace counts
each step for what it took in a file that was made on a quiet machine: then runs depend on nothing else. A file that is
there already is gone on with: runs of the same budget stay, K-FAC's as long as its source is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.robust.contenders import CONTENDERS, choose_contenders, family, missing
from benchmarks.robust.problems import QUICK, choose
from benchmarks.robust.race import Budget, Record, race
from benchmarks.robust.store import Key, Store, paces
from benchmarks.robust.table import rows, standing, strangers, summary

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run what is missing, print the table, and say with the exit code whether any run of K-FAC diverged."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.problems = options.problems or QUICK
        options.seconds, options.seeds = options.seconds or 1.0, options.seeds or 1
    try:
        plan = _plan(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    budget = Budget(options.seconds or 4.0) if options.steps is None else Budget(steps=options.steps)
    store = Store(options.out, budget)
    if options.baseline is not None:
        taken = store.take(options.baseline, kfac=False)
        print(f"{taken} runs taken from {options.baseline}", flush=True)
    todo = [run for run in plan if run not in store]
    known = {} if options.pace is None else paces(options.pace)
    costs = [known.get((problem, name), known.get((problem, family(name)))) for problem, _, name in todo]
    for at, record in enumerate(_run(todo, costs, budget, options.jobs), 1):
        store.add(record)
        _say(record, at, len(todo))
    return _answer(store, plan, options.baseline is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks robust", description=__doc__)
    parser.add_argument("--problems", nargs="+", help="names or kinds; all if left out")
    parser.add_argument("--contenders", nargs="+", help="names or families, kfac or adam:0.001; all if left out")
    parser.add_argument("--only-kfac", action="store_true", help="of the contenders only K-FAC")
    parser.add_argument("--seeds", type=int, help="how many; 5 if left out")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds are this one and those after it")
    parser.add_argument("--seconds", type=float, help="processor seconds of a run's steps; 4 if left out")
    parser.add_argument("--steps", type=int, help="steps of a run, instead of seconds")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} small problems, one seed, one second")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, at most one a core")
    parser.add_argument("--baseline", type=Path, help="an earlier file: runs of the others are taken from it")
    parser.add_argument("--pace", type=Path, help="a file of runs: its seconds a step are taken, none are measured")
    parser.add_argument("--out", type=Path, help="the file that everything goes to; gone on with if it is there")
    return parser


def _plan(options: argparse.Namespace) -> list[Key]:
    """All runs in their order: K-FAC, then Adam, then the rest; in each, seed after seed over all problems."""
    contenders = choose_contenders(options.contenders, only_kfac=options.only_kfac)
    problems, absent = [], {name: why for name in contenders if (why := missing(name))}
    for problem in choose(options.problems):
        if why := problem.missing():
            absent[problem.name] = why
        else:
            problems.append(problem.name)
    for name, why in absent.items():
        print(f"{name} is left out: {why}", flush=True)
    phases = [("kfac",), ("adam",), ("muon", "soap")]
    return [
        (problem, options.first_seed + seed, contender)
        for phase in phases
        for seed in range(options.seeds or 5)
        for problem in problems
        for contender in contenders
        if family(contender) in phase and contender not in absent
    ]


def _run(todo: list[Key], costs: list[float | None], budget: Budget, jobs: int) -> Iterator[Record]:
    if jobs == 1 or len(todo) < 2:
        for run, cost in zip(todo, costs, strict=True):
            yield race(*run, budget, cost)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in as_completed(
            [pool.submit(race, *run, budget, cost) for run, cost in zip(todo, costs, strict=True)]
        ):
            yield done.result()


def _say(record: Record, at: int, count: int) -> None:
    said = [name for name in ("nan", "doubled", "rose") if record[name]]
    said += [record["error"]] if record["error"] else []
    print(
        f"{at}/{count} {record['problem']} seed {record['seed']} {record['contender']}: {record['first']:.3g} -> "
        f"{record['final']:.3g} (best {record['best']:.3g}) in {record['steps']} steps {', '.join(said)}",
        flush=True,
    )


def _answer(store: Store, plan: list[Key], baseline: bool) -> int:
    """Print and keep the table of what was asked for; runs of the others that a baseline has beside it count too."""
    wanted, problems = set(plan), {problem for problem, _, _ in plan}
    records = [
        record
        for record in store
        if (record["problem"], record["seed"], record["contender"]) in wanted
        or (baseline and record["problem"] in problems and family(record["contender"]) != "kfac")
    ]
    report = Report("robust")
    kinds = list(dict.fromkeys(name for _, _, name in plan if family(name) == "kfac"))
    for kind in kinds:
        report.table(f"robust: {kind}, final losses and their ratios to the best of the others", rows(records, kind))
    raced = {record["contender"] for record in records}
    verdicts = [summary(records, name) for name in CONTENDERS if name in raced]
    report.table("robust: runs that diverged, and why; the others by the same measure", verdicts)
    if kinds:
        ratios = [line for kind in kinds for line in standing(records, kind)]
        report.table("robust: number of problems by their ratio of final losses", ratios)
    if strange := strangers(records):
        print(f"the first losses differ, as if problems had changed between runs: {', '.join(strange)}")
    store.save(tables=report.tables)
    return int(any(record["diverged"] for record in records if family(record["contender"]) == "kfac"))
