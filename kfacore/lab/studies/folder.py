"""The folder of a study around its runs: whose it is, what it knows of the plan, what a run's process finds there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kfacore.errors import ConfigError
from kfacore.lab.studies.plan import PlannedRun, Study, load_study
from kfacore.lab.studies.planner import Plan, plan_study
from kfacore.lab.studies.state import own_plan, state_folder
from kfacore.lab.studies.tuning import read_choices
from kfacore.lab.training.files import disk_errors, require_folder, write_json

if TYPE_CHECKING:
    from kfacore.lab.studies.config import StudyConfig
    from kfacore.registry import Registry

__all__ = ["check_folder", "plan_into", "write_planned"]


def plan_into(
    registry: Registry, config: StudyConfig, folder: Path, *, origin: str = "study", data_dir: str | None = None
) -> Plan:
    """The plan of a study with what its folder already knows: choices of tuning, states of runs. Writes nothing.

    Args:
        registry: Where the components are.
        config: The study file.
        folder: The study folder, which need not exist yet.
        origin: The file's name, for messages.
        data_dir: Folder of the data files of all problems.

    Raises:
        ConfigError: Something is wrong with the file, or the folder holds another study.
        DataError: A file in the folder is damaged.
    """
    check_folder(folder, config.name)
    plan = plan_study(registry, config, folder, origin=origin, data_dir=data_dir)
    choices = read_choices(folder, plan.tunings)
    if choices:
        plan = plan_study(registry, config, folder, origin=origin, data_dir=data_dir, choices=choices)
    study = plan.study.refreshed()
    tunings = tuple(replace(tuning, runs=study.as_found(tuning.runs)) for tuning in plan.tunings)
    return replace(plan, study=study, tunings=tunings)


def check_folder(folder: Path, name: str) -> None:
    """Make sure that a folder is free for a study, or holds this one.

    Raises:
        ConfigError: It holds another study, a run, other files, or is a file.
        DataError: Its ``study.json`` is damaged.
    """
    require_folder(folder, "name a folder for the study with --out")
    if not folder.is_dir():
        return
    if (folder / "study.json").exists():
        other = load_study(folder).name
        if other != name:
            raise ConfigError(f"--out {folder} holds the study '{other}', not '{name}'; choose another folder")
    elif (folder / "config.json").exists():
        raise ConfigError(f"--out {folder} holds a run of kfac train; choose another folder for the study")
    elif not (folder / "state").exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} holds other files and no study; choose an empty folder, or a new one")


def write_planned(study: Study, run: PlannedRun) -> None:
    """Write down what the process that executes a run needs to know.

    Twice: machines that share the study may have their data in different places, so each reads what it has written
    itself, if it has; a batch system's job, on whatever machine, reads the last.
    """
    folder = state_folder(study.folder, run.hash)
    content = {
        "study": study.name,
        "variant": run.variant,
        "problem": run.problem,
        "seed": run.seed,
        "config": dict(run.config),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "planned.json", content)
        write_json(own_plan(folder), content)
