"""The role of an executor: where the runs of a study are executed. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfacore.roles.base import Part
from kfacore.schema.slots import ExecutorConfig

__all__ = ["Ended", "Executor"]


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        run: Hash of the run that it executed.
        code: Its exit code, negative the number of the signal that killed it, or None if that is unknown.
        reason: What the executor knows of the end besides the code, for example that a job was cancelled.
        again: Whether nothing is held against the run, so that it is simply started again.
    """

    run: str
    code: int | None
    reason: str = ""
    again: bool = False


class Executor(Part):
    """Starts a process for each run and tells when it has ended.

    Every process does the same thing: `kfacore.lab.studies.worker.execute` with the study folder and the run's hash. It
    claims the run, trains or resumes it, and writes how it ended; the exit code matters only where it could not.

    Life: `open` once, then `submit` and `poll` as often as needed, `close` once, also after an error.

    Attributes:
        processes: How many processes a run is divided among, set before `open`. The process of a run starts them itself
            (`kfacore.lab.studies.worker`), unless an executor does, in torch's environment (RANK, WORLD_SIZE, ...).
    """

    config: ExecutorConfig
    processes: int = 1

    @property
    def workers(self) -> int:
        """Runs that may be under way at the same time."""
        return self.config.workers

    @abstractmethod
    def open(self, study: Path, *, threads: int) -> None:
        """Get ready to execute runs of a study.

        Args:
            study: The study folder.
            threads: CPU threads of each run.

        Raises:
            ResourceError: What the executor needs is not there.
        """

    @abstractmethod
    def submit(self, run: str) -> None:
        """Start a run, or queue it where a queue decides when it starts.

        Args:
            run: Its hash; its configuration lies in the study folder.

        Raises:
            ResourceError: No process can be started.
        """

    @abstractmethod
    def poll(self, timeout: float) -> Sequence[Ended]:
        """The processes that have ended since the last call, each told once.

        Args:
            timeout: Seconds to wait for the first of them; fewer if one ends earlier.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask every process to finish its step, save and end (SIGTERM); `poll` tells when they have."""

    @abstractmethod
    def close(self) -> None:
        """End what is still there, at once, and release everything."""
