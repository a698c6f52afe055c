"""Runs of a study as jobs of a SLURM cluster, through submitit. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from kfac_plugins.executors import SlurmConfig
from kfacore.errors import ConfigError, ResourceError
from kfacore.lab.studies.state import state_folder
from kfacore.lab.training.files import disk_errors
from kfacore.lab.training.signals import Terminated, heard_signals
from kfacore.roles import Ended, Executor
from kfacore.schema.slots import SlotConfig

__all__ = ["Job", "Slurm"]

_LOOK_SECONDS = 0.5
_CLOSE_SECONDS = 30.0
_REQUEUES = 1000
"""Time limits that a run may meet before submitit gives it up; a run saves before each."""


class Job:
    """What a job executes: `kfacore.lab.studies.worker.execute`, again after a preemption.

    Args:
        study: The study folder, on a disk that all machines of the cluster share.
        run: The run's hash.
        alone: Whether the job is a child of submitit's local mode, and ends, saved, when that is gone.
        processes: Tasks of the job, each one process of the run.
    """

    def __init__(self, study: Path, run: str, *, alone: bool = False, processes: int = 1) -> None:
        self.processes = processes
        self.study = study
        self.run = run
        self.alone = alone

    def __call__(self) -> int:
        """Execute the run and return its exit code; after a preemption, put it back into the queue.

        submitit announces a preemption by a signal, whose handler puts the job back and leaves from wherever the
        process is: in the middle of a checkpoint, say, which then fails. So the signal only asks the run to stop after
        its step, saved, and the handler has its turn when that is done.
        """
        from kfacore.lab.studies.worker import execute

        if self.processes > 1:
            import_module("submitit").helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        announced: list[int] = []
        handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, lambda number, frame: announced.append(number))
        wish = _wish(self.study, self.run)
        parent = os.getppid() if self.alone else None
        code = execute(self.study, self.run, parent=parent, leave=lambda: bool(announced) or wish.exists())
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if announced and code == Terminated.exit_code:
            signal.raise_signal(announced[0])  # submitit's handler does not return
        return code

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue: the same run, which goes on from its checkpoint."""
        return import_module("submitit").helpers.DelayedSubmission(self)


def _wish(study: Path, run: str) -> Path:
    """The file by which a job is asked to end."""
    return state_folder(study, run) / "stop"


class Slurm(Executor):
    """A job for each run. Jobs go on when the runner ends; one that finds its run taken or finished ends at once."""

    Config: ClassVar[type[SlotConfig]] = SlurmConfig
    config: SlurmConfig

    def __init__(self, config: SlotConfig | None = None) -> None:
        super().__init__(config)
        self._study = Path()
        self._submitit: Any = None
        self._executor: Any = None
        self._jobs: dict[str, Any] = {}

    def open(self, study: Path, *, threads: int) -> None:
        """Set up submitit.

        Raises:
            ResourceError: submitit or SLURM's commands are not installed.
            ConfigError: An option is not one of sbatch's.
        """
        config = self.config
        self._study = study.resolve()
        try:
            self._submitit = import_module("submitit")
        except ModuleNotFoundError as error:
            raise ResourceError(
                "the executor slurm needs the package submitit, which is not installed; "
                "install it with: pip install 'kfacore[slurm]'"
            ) from error
        try:
            self._executor = self._submitit.AutoExecutor(
                folder=self._study / "jobs",
                cluster=config.cluster,
                **{f"{config.cluster}_max_num_timeout": _REQUEUES},
            )
        except RuntimeError as error:
            raise ResourceError(
                f"no jobs can be sent to SLURM from this machine: {error}; run the study on a login node, or with "
                "--executor local"
            ) from error
        if self.processes % config.nodes:
            raise ConfigError(
                f"executor: processes = {self.processes} cannot be spread evenly over nodes = {config.nodes}"
            )
        several = {"nodes": config.nodes, "tasks_per_node": self.processes // config.nodes}
        given = {
            **(several if self.processes > 1 else {}),
            "name": "kfac-study",
            "timeout_min": config.minutes,
            "cpus_per_task": threads,
            "mem_gb": config.memory_gb,
            "gpus_per_node": config.gpus or None,
            "slurm_partition": config.partition,
            "slurm_additional_parameters": dict(config.options) or None,
        }
        try:
            self._executor.update_parameters(**{key: value for key, value in given.items() if value is not None})
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"executor: submitit refuses an option: {error}") from error

    def submit(self, run: str) -> None:
        """Queue a job.

        Raises:
            ResourceError: SLURM refuses it.
        """
        _wish(self._study, run).unlink(missing_ok=True)
        try:
            with heard_signals():
                job = Job(self._study, run, alone=self._alone, processes=self.processes)
                self._jobs[run] = self._executor.submit(job)
            if self._alone:  # no file system of a cluster that is late with the result of a job that was killed
                self._jobs[run]._results_timeout_s = 0
        except Exception as error:  # submitit lets whatever sbatch causes through
            raise ResourceError(f"SLURM does not take the job: {error}; see executor.options") from error

    def poll(self, timeout: float) -> Sequence[Ended]:
        """Jobs that have ended."""
        limit = time.monotonic() + timeout
        while True:
            ended = [self._end(run, job) for run, job in self._jobs.items() if job.done()]
            for end in ended:
                del self._jobs[end.run]
            left = limit - time.monotonic()
            if ended or left <= 0:
                return ended
            time.sleep(min(_LOOK_SECONDS, left))

    def stop(self) -> None:
        """Cancel the jobs; SLURM sends SIGTERM first, and kills after a while.

        submitit's local mode kills after one second, which on a busy machine is not enough to save: there the jobs are
        asked by a file, at which they look after every step.
        """
        if not self._alone:
            self._cancel()
            return
        for run in self._jobs:
            wish = _wish(self._study, run)
            with disk_errors(wish):
                wish.touch()

    def close(self) -> None:
        """Cancel what is left; what SLURM does not know any more has ended."""
        self._cancel()
        limit = time.monotonic() + _CLOSE_SECONDS
        while self._alone and time.monotonic() < limit and not all(job.done() for job in self._jobs.values()):
            time.sleep(0.05)  # here they are our children, and nothing is to be left behind
        self._jobs.clear()

    @property
    def _alone(self) -> bool:
        return self.config.cluster == "local"

    def _cancel(self) -> None:
        for job in self._jobs.values():
            job.cancel(check=False)

    def _end(self, run: str, job: Any) -> Ended:
        try:
            return Ended(run, int(job.results()[0]))  # of the first task, which tells how the run ended
        except Exception as error:  # the job was killed, cancelled, or lost: submitit has an exception for each
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Ended(run, None, f"job {job.job_id} ended without a result ({job.state}): {reason}")
