"""Models that people train, in equal processor seconds on one thread: K-FAC with nothing set, a guest, and the others.

Every method gets its best mini-batch, and those with a learning rate the best of four, found in runs of a third of the
budget with one seed. Runs are kept in --out as they end, and a race that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.real.methods import METHODS
from benchmarks.real.race import Run, choose
from benchmarks.real.store import Runs
from benchmarks.real.table import rows
from benchmarks.real.tasks import MODELS, absent
from benchmarks.report import Report

__all__ = ["main"]

_BESIDE = Path(__file__).parents[3] / "shared" / "data"


def main(arguments: list[str]) -> int:
    """Run what is missing and print one table a model; 2 if a file of data is not there."""
    options = _parser().parse_args(arguments)
    models, methods = options.model or list(MODELS), options.method or list(METHODS)
    if missing := [why for name in models if (why := absent(name, options.data))]:
        print("\n".join(missing), file=sys.stderr)
        return 2
    runs = Runs(options.out, options.data, tuple(options.again))
    report = Report("real", seconds=options.seconds)
    for model in models:
        finals = []
        for method in methods:
            batch, rate = choose(model, method, round(options.seconds / 3, 3), runs.done)
            finals += [
                runs.done(Run(model, method, batch, rate, options.seconds, seed)) for seed in range(options.seeds)
            ]
        report.table(f"real: {model}, {options.seconds:g} processor seconds", rows(finals))
    if options.picture is not None:
        from benchmarks.real.picture import draw

        draw([run for run in runs if run["seconds"] == options.seconds], options.picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real", description=__doc__)
    parser.add_argument("--data", type=Path, default=_BESIDE, help="folder of the files that the models are trained on")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="repeatable; all if left out")
    parser.add_argument("--method", choices=METHODS, action="append", help="repeatable; all if left out")
    parser.add_argument("--again", choices=METHODS, action="append", default=[], help="forget its runs in --out")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor seconds of a run's steps")
    parser.add_argument("--seeds", type=int, default=1, help="of the last runs")
    parser.add_argument("--out", type=Path, help="the file that runs are kept in; gone on with if it is there")
    parser.add_argument("--picture", type=Path, help="a picture of the curves")
    return parser
