"""The processes of one run of a study on this machine, started by torchrun; this one waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from kfacore.lab.studies.state import BUSY, read_state, state_folder
from kfacore.lab.training.signals import Terminated

__all__ = ["launch", "left_alone"]

_LAUNCHER = "KFAC_STUDY_LAUNCHER"
"""Environment variable: process id of the one that started torchrun. When it is gone the run stops, saved."""

_LOOK_SECONDS = 0.2


def launch(study: Path, run: str, processes: int, parent: int | None, leave: Callable[[], bool] | None = None) -> int:
    """Execute a run in several processes and wait for its end.

    Args:
        study: The study folder.
        run: The run's hash.
        processes: How many.
        parent: When this process is no longer our parent, the run stops after its step, saved.
        leave: Asked now and then; once it says yes, the run stops, saved.

    Returns:
        An exit code as that of `kfacore.lab.studies.worker.execute`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "kfacore.lab.studies.worker", str(study), run]
    with open(state_folder(study, run) / "log.txt", "ab") as log:
        torchrun = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, _LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    sent = False
    try:
        while torchrun.poll() is None:
            orphaned = parent is not None and os.getppid() != parent
            if (stopping or orphaned or (leave is not None and leave())) and not sent:
                torchrun.terminate()  # which hands it on to all
                sent = True
            time.sleep(_LOOK_SECONDS)
    finally:
        if torchrun.poll() is None:
            torchrun.kill()
            torchrun.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _code(study, run, torchrun.returncode, stopped=sent)


def _code(study: Path, run: str, code: int, *, stopped: bool) -> int:
    """Of the run rather than of torchrun, which has one for all failures."""
    state = read_state(study, run)
    if state.ended:
        return {"done": 0, "diverged": 3}.get(state.state, 1)
    if stopped:
        return Terminated.exit_code
    return BUSY if code == 0 else 1


def left_alone() -> Callable[[], bool] | None:
    """Whether the process that started torchrun is gone, as a question to ask; None where there is none."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return None

    def gone() -> bool:
        try:
            os.kill(int(launcher), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    return gone
