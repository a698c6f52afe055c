"""A study whose report has everything in it, and how tests look into reports."""

from __future__ import annotations

from pathlib import Path

from study_folders import write_study

from kfacore.lab.studies.html_page import page
from kfacore.lab.studies.plan import Study, Target
from kfacore.lab.studies.report_data import read_runs
from kfacore.lab.studies.report_results import analyse

VARIANTS = {
    "tridiag": {},
    "blockdiag": {"floor": 1.2, "rate": 0.15, "seconds": 0.3},
    "wild & <b>": {"rate": 0.19},
    "nesterov": {"approx": None, "floor": 3.0, "rate": 0.03, "seconds": 0.1, "averaged": False},
}
STATES = {("wild & <b>", 2): ("diverged", "the loss of step 31 is nan"), ("nesterov", 5): ("failed", "killed <oom>")}


def whole_study(folder: Path) -> Study:
    """Four variants, six seeds, a run that diverged and one that failed."""
    return write_study(folder, VARIANTS, states=STATES, target=Target("averaged_train_error", 1.5))


def cell(results, name, problem="curves"):
    return next(cell for cell in results.cells[problem] if cell.variant.name == name)


def page_of(study):
    """The page without its pictures, which take most of the time."""
    return page(analyse(study, read_runs(study)), {}, {})
