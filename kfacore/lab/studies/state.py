"""How far a run is and how it ended: ``state/HASH`` in the study folder. Imports no torch.

::

    planned.json     the run's configuration, for the process that executes it
    planned-M.json   the same as machine M has written it, for its own processes
    claim-N          who executes it (`kfacore.lab.studies.claims`)
    outcome.json     how it ended
    journal.jsonl    every life of the run: when it began and how it stopped
    log.txt          what its processes printed
    stop             an executor's wish that the run ends after its step, saved, where no signal can carry it

How it ended and the journal are written by the holder of the claim alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kfacore.errors import DataError
from kfacore.lab.studies.claims import here_tag, read_holder
from kfacore.lab.training.files import disk_errors, write_json

__all__ = [
    "BUSY",
    "STOPPED",
    "RunState",
    "State",
    "clear_outcome",
    "note",
    "own_plan",
    "read_journal",
    "read_state",
    "state_folder",
    "write_outcome",
]

State = Literal["pending", "running", "done", "failed", "diverged"]
"""States of a run: waiting (perhaps with a checkpoint), claimed, and the three ends."""


BUSY = 75
"""Exit code of a run's process: another one executes the run."""

STOPPED = (130, 143)
"""Exit codes of a run's process that was stopped by a signal and has saved."""


@dataclass(frozen=True)
class RunState:
    """A run's state.

    Attributes:
        state: The state.
        reason: Why it failed or diverged.
    """

    state: State
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to the run, unless it is asked for again."""
        return self.state not in ("pending", "running")


def state_folder(study: Path, run: str) -> Path:
    """The folder with a run's state."""
    return study / "state" / run


def own_plan(folder: Path) -> Path:
    """In a run's state folder, the file with its configuration as this machine has written it."""
    return folder / f"planned-{here_tag()}.json"


def read_state(study: Path, run: str) -> RunState:
    """The state of a run.

    Args:
        study: The study folder.
        run: Its hash.

    Raises:
        DataError: Its outcome is damaged.
    """
    folder = state_folder(study, run)
    file = folder / "outcome.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        state, reason = content["state"], str(content["reason"])
        if state not in ("done", "failed", "diverged"):
            raise ValueError(f"unknown state {state!r}")
    except FileNotFoundError:
        holder = read_holder(folder)
        return RunState("pending" if holder is None or holder.gone else "running")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}; delete it, and the run is looked at again") from error
    return RunState(state, reason)


def write_outcome(study: Path, run: str, outcome: RunState) -> None:
    """Write how a run ended, and add it to the journal before. For the holder of the claim only.

    A process that is killed between the two leaves a run whose end is written in its next life: in the journal once.

    Raises:
        ResourceError: The disk refused.
    """
    folder = state_folder(study, run)
    last = (read_journal(study, run) or [{}])[-1]
    known = (last.get("what"), last.get("reason", "")) == (outcome.state, outcome.reason)
    if not known or outcome.state == "failed":  # a failed run may be tried again, and fail in the same way
        note(study, run, outcome.state, outcome.reason)
    with disk_errors(folder):
        write_json(folder / "outcome.json", {"state": outcome.state, "reason": outcome.reason})


def clear_outcome(study: Path, run: str) -> None:
    """Forget a failure, so that the run is tried again. For the holder of the claim only."""
    (state_folder(study, run) / "outcome.json").unlink(missing_ok=True)


def note(study: Path, run: str, what: str, reason: str = "", **facts: Any) -> None:
    """Add a line to a run's journal. For the holder of the claim only.

    Raises:
        ResourceError: The disk refused.
    """
    file = state_folder(study, run) / "journal.jsonl"
    line = {"what": what, "time": datetime.now(UTC).isoformat(timespec="seconds"), "pid": os.getpid(), **facts}
    if reason:
        line["reason"] = reason
    with disk_errors(file), open(file, "ab") as journal:
        journal.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read_journal(study: Path, run: str) -> list[dict[str, Any]]:
    """The lives of a run, oldest first; a torn line (the process was killed while it wrote) is left out."""
    file = state_folder(study, run) / "journal.jsonl"
    if not file.exists():
        return []
    lines = []
    for line in file.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
