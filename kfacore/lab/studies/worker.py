"""What happens in the process of one run: claim it, train or resume it, write how it ended.

Also a program, ``python -m kfacore.lab.studies.worker STUDY HASH``. Exit codes are those of ``kfac train``, and
`kfacore.lab.studies.state.BUSY`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.errors import DataError, KfacError, NumericalError
from kfacore.lab.config.resolve import read_saved
from kfacore.lab.studies.claims import Claim
from kfacore.lab.studies.identity import relevant
from kfacore.lab.studies.launch import launch, left_alone
from kfacore.lab.studies.machine import Presence
from kfacore.lab.studies.state import BUSY, RunState, note, own_plan, read_state, state_folder, write_outcome
from kfacore.lab.training.outcome import Losses
from kfacore.lab.training.processes import joined, started
from kfacore.lab.training.run import RunFolder
from kfacore.lab.training.signals import Interrupted
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.registry import get_registry

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["execute", "main"]

_FAILED = 1


def execute(
    study: Path,
    run: str,
    *,
    registry: Registry | None = None,
    parent: int | None = None,
    leave: Callable[[], bool] | None = None,
) -> int:
    """Execute one run of a study in this process, unless another one does or it has ended.

    Args:
        study: The study folder.
        run: The run's hash; ``state/HASH`` has its configuration.
        registry: Where the components are; everything installed by default.
        parent: Process id of the one that started this process: when it is gone, the run stops after its step, saved.
        leave: Asked after every step; once it says yes, the run stops, saved.

    Returns:
        An exit code: 0 done, 1 failed, 3 diverged, 130 or 143 stopped and saved, or `BUSY`.
    """
    processes = int(_read_planned(study, run)["config"].get("processes", 1)) if _planned(study, run) else 1
    if processes > 1 and started() == 1:
        return launch(study, run, processes, parent, leave)
    if processes > 1:
        return _member(study, run, registry or get_registry(), parent, leave)
    claim = Claim.take(state_folder(study, run), on_lost=_die)
    if claim is None:
        return BUSY
    try:
        if read_state(study, run).ended:
            return 0
        return _attempt(study, run, registry or get_registry(), claim, parent, leave)
    finally:
        claim.release()


def _member(study: Path, run: str, registry: Registry, parent: int | None, leave: Callable[[], bool] | None) -> int:
    """One of the processes of a run: the first claims it and writes how it ended, the others train with it."""
    planned = _read_planned(study, run)
    with joined(str(planned["config"].get("device", "auto"))) as ranks:
        first = ranks.rank == 0
        claim = Claim.take(state_folder(study, run), on_lost=_die) if first else None
        try:
            told = 0 if first and read_state(study, run).ended else None if claim else BUSY
            done = ranks.gather("claim", told)[0]
            if done is not None:
                return int(done)
            if claim is not None:
                return _attempt(study, run, registry, claim, parent, leave, ranks)
            return _follow(study, run, planned, registry, ranks)
        finally:
            if claim is not None:
                claim.release()


def _follow(study: Path, run: str, planned: Mapping[str, Any], registry: Registry, ranks: Ranks) -> int:
    """Train with the first process, which tells what came of it."""
    try:
        _train(study, run, planned, registry, lambda event: None, ranks)
    except KfacError as error:
        return error.exit_code
    return 0


def _attempt(
    study: Path,
    run: str,
    registry: Registry,
    claim: Claim,
    parent: int | None,
    leave: Callable[[], bool] | None,
    ranks: Ranks = ALONE,
) -> int:
    """One life of a run, written down."""
    planned = _read_planned(study, run)
    leaving = False
    with Presence(study, run) as presence:

        def watch(event: Mapping[str, Any]) -> None:
            nonlocal leaving
            if event["event"] == "start":
                _annotate(study, run, planned, presence)
            if claim.lost:
                _die()
            orphaned = parent is not None and os.getppid() != parent
            if not leaving and (orphaned or (leave is not None and leave())):
                leaving = True  # once: a second signal would not wait for the step
                signal.raise_signal(signal.SIGTERM)

        try:
            fault = _train(study, run, planned, registry, watch, ranks)
        except Interrupted as stopped:
            note(study, run, "stopped", step=stopped.step)
            return stopped.exit_code
        except NumericalError as error:
            outcome, code = RunState("diverged", _reason(error, study)), error.exit_code
        except KfacError as error:
            outcome, code = RunState("failed", _reason(error, study)), _FAILED
        except Exception as error:
            file = state_folder(study, run) / "traceback.txt"
            file.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            reason = (str(error).strip().splitlines() or [""])[0]
            where = file.relative_to(study)
            outcome, code = RunState("failed", f"{type(error).__name__}: {reason} (traceback in {where})"), _FAILED
        else:
            outcome, code = (RunState("diverged", fault), NumericalError.exit_code) if fault else (RunState("done"), 0)
        with contextlib.suppress(DataError):  # it failed before it had a manifest
            _annotate(study, run, planned, presence)
        write_outcome(study, run, outcome)
        return code


def _train(
    study: Path,
    run: str,
    planned: Mapping[str, Any],
    registry: Registry,
    watch: Callable[[Mapping[str, Any]], None],
    ranks: Ranks = ALONE,
) -> str:
    """Start the run or go on with it, whatever is there of it.

    Returns:
        In what way it fell apart with finite numbers to the end, empty if it did not.
    """
    from kfacore.lab.training.loop import train

    folder = RunFolder(study / "runs" / run)
    config = read_saved(registry, planned["config"])
    way = ""
    with ranks.together("preparation"):
        if ranks.rank == 0:
            way = _prepared(study, run, folder, config)
    way = ranks.gather("preparation", way)[0]
    if way == "ended":
        return _fault(Losses.of(folder.events()))
    place = {"out": folder.path} if way == "started" else {"resume": folder.path}
    return _fault(train(config, registry=registry, listeners=[watch], **place).losses)


def _prepared(study: Path, run: str, folder: RunFolder, config: RunConfig) -> str:
    """What is to be done with what is there: ``"started"``, ``"resumed"`` or ``"ended"``."""
    if not folder.checkpoint_file.exists():
        if folder.path.exists():  # killed before the first checkpoint: nothing of it is worth keeping
            shutil.rmtree(folder.path)
        note(study, run, "started")
        return "started"
    if relevant(folder.read_config()) != relevant(config.as_dict()):
        raise DataError(f"{folder.path} holds another run than its name says; delete it, and it is run anew")
    events = folder.events()
    if events and events[-1].get("event") == "done":  # killed between its end and the writing of its outcome
        return "ended"
    note(study, run, "resumed")
    return "resumed"


def _fault(losses: Losses) -> str:
    """Why a run that came to its end has diverged, empty if it has not."""
    return f"it got worse: training loss {losses}" if losses.verdict == "diverged" else ""


def _planned(study: Path, run: str) -> bool:
    folder = state_folder(study, run)
    return own_plan(folder).exists() or (folder / "planned.json").exists()


def _read_planned(study: Path, run: str) -> dict[str, Any]:
    folder = state_folder(study, run)
    file = own_plan(folder) if own_plan(folder).exists() else folder / "planned.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; run kfac study run again to write it anew") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise DataError(f"{file} holds no configuration; run kfac study run again to write it anew")
    return content


def _reason(error: KfacError, study: Path) -> str:
    """What a report says of a run: with paths from the study folder on, since reports are passed on."""
    return str(error).replace(f"{study.resolve()}{os.sep}", "").replace(f"{study}{os.sep}", "")


def _annotate(study: Path, run: str, planned: Mapping[str, Any], presence: Presence) -> None:
    """Say in the run's manifest which study it belongs to, and whether it shared the machine (its seconds)."""
    folder = RunFolder(study / "runs" / run)
    manifest = folder.read_manifest()
    facts = {key: value for key, value in planned.items() if key != "config"}
    facts["shared_machine"] = presence.shared
    if manifest.get("study") != facts:
        folder.write_manifest({**manifest, "study": facts})


def _die() -> None:
    """Another process has taken over, because this one showed no sign of life: nothing may be written any more."""
    os._exit(BUSY)


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="kfacore.lab.studies.worker", description="Execute one run of a study.")
    parser.add_argument("study", type=Path)
    parser.add_argument("run")
    given = parser.parse_args(arguments)
    return execute(given.study, given.run, parent=os.getppid(), leave=left_alone())


if __name__ == "__main__":
    raise SystemExit(main())
