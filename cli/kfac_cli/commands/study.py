"""The commands `kfac study run`, `status` and `report`: many runs from one file."""

from __future__ import annotations

import json as jsonlib
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfacore.registry import get_registry

if TYPE_CHECKING:
    from kfacore.lab.studies.plan import Study
    from kfacore.lab.studies.planner import Plan
    from kfacore.lab.studies.runner import StudyResult

__all__ = ["register"]

FAILED = 4
"""Exit code: some runs failed or diverged."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="A study file (TOML), or the folder of a study.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The study folder (default: studies-out/NAME).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the study, for example budget.steps=100; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _executors(incomplete: str) -> list[str]:
    """Completion of --executor."""
    return [c.name for c in get_registry().components("executor") if c.name.startswith(incomplete)]


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study file (TOML).")],
    out: Out = None,
    sets: Sets = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Runs at the same time.")] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where the runs are executed: local (default), slurm; kfac list executor has all.",
            autocompletion=_executors,
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the problems' data files.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop the study when a run fails.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs; execute nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON on stdout.")] = False,
) -> None:
    """Execute what is left of a study. Finished runs are never run again.

    Ctrl-C saves the runs under way and prints the command that goes on; a second one stops at once.
    """
    from kfacore.lab.studies.config import read_study
    from kfacore.lab.studies.folder import plan_into
    from kfacore.lab.studies.runner import run_study

    given = [*(sets or []), *([f"executor.workers={workers}"] if workers is not None else [])]
    config = read_study(file, sets=given, executor=executor)
    registry = get_registry()
    registry.config("executor", config.executor)
    folder = out if out is not None else _default_folder(config.name)
    place = None if data_dir is None else str(data_dir)
    if dry_run:
        plan = plan_into(registry, config, folder, origin=str(file), data_dir=place)
        _show_plan(plan, json=json)
        return
    from kfac_cli.study_live import StudyLive

    with StudyLive() as live:
        listeners: list[Callable[[Mapping[str, Any]], None]] = [live]
        if json:
            listeners.append(_print_event)
        result = run_study(
            registry,
            config,
            folder,
            origin=str(file),
            data_dir=place,
            fail_fast=fail_fast,
            retry_failed=retry_failed,
            listeners=listeners,
        )
    _finish(result, folder)


def status(file: File, out: Out = None, json: Json = False) -> None:
    """Show how far a study is, run by run."""
    from kfacore.lab.studies.plan import load_study

    study = load_study(_folder_of(file, out))
    if json:
        print_study(study)
        return
    _show_status(study)


def report(
    file: File,
    out: Out = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Folder of the report (default: in the study)."),
    ] = None,
) -> None:
    """Write the report of a study: one HTML file, figures and tables."""
    from kfacore.lab.studies.report import write_report

    folder = _folder_of(file, out)
    written = write_report(folder, to if to is not None else folder / "report")
    typer.echo(str(written))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    study = typer.Typer(name="study", help="Many runs from one file, and their comparison.", no_args_is_help=True)
    app.add_typer(study)
    for command in (run, status, report):
        study.command()(command)


def _default_folder(name: str) -> Path:
    return Path("studies-out") / name


def _folder_of(file: Path, out: Path | None) -> Path:
    """The study folder that a study file or a folder means."""
    if out is not None:
        return out
    if file.is_dir():
        return file
    from kfacore.lab.studies.config import read_study

    return _default_folder(read_study(file).name)


def _print_event(event: Mapping[str, Any]) -> None:
    """One line of strict JSON, at once."""
    from kfacore.lab.training.files import plain

    sys.stdout.write(jsonlib.dumps(plain(event), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finish(result: StudyResult, folder: Path) -> None:
    """Say how the study ended and leave with its exit code."""
    from kfac_cli.study_live import counts_text

    typer.echo(f"study {result.study.name}: {counts_text(result.study.counts())}, in {folder}", err=True)
    if result.stopped is not None:
        command = f"kfac study run {' '.join(map(shlex.quote, sys.argv[3:]))}"
        typer.echo(f"stopped by {result.stopped.name}; everything is saved. Go on with:\n{command}", err=True)
        raise typer.Exit(143 if result.stopped == signal.SIGTERM else 130)
    for run in result.failures:
        where = f"{run.variant} ({run.problem}, seed {run.seed}, {run.hash})"
        typer.echo(f"{run.state}: {where}: {run.reason}", err=True)
    for variant, problem in result.lost:
        typer.echo(f"no runs: {variant} ({problem}): no tuning run came to its end with a number", err=True)
    if any(run.state == "failed" for run in result.failures):
        typer.echo("failed runs are tried again with --retry-failed", err=True)
    if result.failures or result.lost:
        raise typer.Exit(FAILED)


def _show_plan(plan: Plan, *, json: bool) -> None:
    """What would be run."""
    study = plan.study
    tuning = [(run, True) for tuning in plan.tunings for run in tuning.runs]
    runs = [*tuning, *((run, False) for run in study.runs)]
    if json:
        from kfac_cli.answers import print_json

        print_json(
            {
                **study.as_dict(),
                "runs": [{**run.as_entry(), "tuning": tuned, "config": dict(run.config)} for run, tuned in runs],
                "waiting": [
                    {"variant": variant, "problem": problem, "runs": len(study.seeds)}
                    for variant, problem in plan.waiting
                ],
            }
        )
        return
    from kfac_cli.answers import table
    from kfacore.lab.studies.tables import counted

    rows = [["run", "variant", "problem", "seed", "state"]]
    rows += [
        [run.hash, f"{run.variant}{' (tuning)' if tuned else ''}", run.problem, str(run.seed), run.state]
        for run, tuned in runs
    ]
    rows += [
        ["(after tuning)", variant, problem, ", ".join(map(str, study.seeds)), "waiting"]
        for variant, problem in plan.waiting
    ]
    typer.echo(table(rows, indent=""))
    axes = {"variant": study.variants, "problem": study.problems, "seed": study.seeds}
    product = " x ".join(counted(len(values), noun) for noun, values in axes.items())
    typer.echo(f"{counted(plan.total, 'run')}: {product}" + (f", {len(tuning)} for tuning" if tuning else ""))


def print_study(study: Study) -> None:
    """The study with its runs as one JSON document."""
    from kfac_cli.answers import print_json

    print_json({**study.as_dict(), "counts": study.counts(), "runs": [run.as_entry() for run in study.runs]})


def _show_status(study: Study) -> None:
    from kfac_cli.answers import table
    from kfac_cli.live import duration, figure
    from kfac_cli.study_live import counts_text
    from kfacore.lab.studies.runner import last_event

    rows = [["variant", "problem", "seed", "state", "step", "error", "seconds", "run"]]
    for run in study.runs:
        event = last_event(run.path) or {}
        seconds = event.get("seconds")
        rows.append(
            [
                run.variant,
                run.problem,
                str(run.seed),
                run.state,
                str(event.get("step", "-")),
                figure(event.get("error")),
                "-" if seconds is None else duration(seconds),
                run.hash,
            ]
        )
    typer.echo(table(rows, indent=""))
    for run in study.runs:
        if run.reason:
            typer.echo(f"{run.state}: {run.variant} ({run.problem}, seed {run.seed}): {run.reason}")
    typer.echo(f"study {study.name}: {counts_text(study.counts()) or 'no runs yet'}, in {study.folder}")
