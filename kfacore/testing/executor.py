"""The conformance suite of executors: real processes, of runs that take a moment."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kfacore.lab.studies.config import read_study
from kfacore.lab.studies.folder import plan_into, write_planned
from kfacore.lab.studies.plan import Study
from kfacore.lab.studies.state import read_journal, read_state
from kfacore.registry import get_registry
from kfacore.roles.executor import Ended, Executor
from kfacore.testing.base import ComponentSuite

__all__ = ["ExecutorSuite"]

_PATIENCE = 600.0
"""Seconds that a machine with much else to do may take for anything; only a failure waits so long."""
_LONG = 1_000_000


class ExecutorSuite(ComponentSuite):
    """Tests of an executor, on a study of tiny runs on this machine. Set `name`, perhaps `options`."""

    slot = "executor"

    def study(self, folder: Path, *, runs: int = 1, steps: int = 3) -> Study:
        """A study as a runner leaves it before it submits: every run is written down, none has begun."""
        x = np.random.default_rng(0).random((40, 6), dtype=np.float32).round()
        np.savez(folder / "data.npz", x_train=x)
        file = folder / "suite.toml"
        data = json.dumps(str(folder / "data.npz"))
        file.write_text(
            f"seeds = {runs}\nbudget.steps = {steps}\n[base]\npictures = false\ncheckpoint.every = 1\n"
            f"likelihood = 'bernoulli'\nproblem = {{ kind = 'npz', file = {data}, sizes = [4] }}\n",
            encoding="utf-8",
        )
        study = plan_into(get_registry(), read_study(file), folder / "study").study
        study.write()
        study.write_index()
        for run in study.runs:
            write_planned(study, run)
        return study

    @contextmanager
    def opened(self, study: Study) -> Iterator[Executor]:
        """An executor at work on the study, closed whatever happens."""
        executor: Executor = self.build()
        executor.open(study.folder, threads=1)
        try:
            yield executor
        finally:
            executor.close()

    def wait(self, executor: Executor, count: int) -> list[Ended]:
        """The next ends, as many as asked for."""
        ended: list[Ended] = []
        limit = time.monotonic() + _PATIENCE
        while len(ended) < count:
            assert time.monotonic() < limit, f"{len(ended)} of {count} processes were told within {_PATIENCE:g} s"
            ended += executor.poll(0.2)
        return ended

    def test_every_run_is_executed_and_told_once(self, tmp_path: Path) -> None:
        """Done in the study folder, each in a process of its own."""
        study = self.study(tmp_path, runs=2)
        names = [run.hash for run in study.runs]
        with self.opened(study) as executor:
            for name in names:
                executor.submit(name)
            ended = self.wait(executor, 2)
            assert sorted(end.run for end in ended) == sorted(names), f"submitted {names}, told of {ended}"
            assert not list(executor.poll(0.5)), "an end was told twice"
        for end in ended:
            state = read_state(study.folder, end.run)
            assert state.state == "done", f"the run is {state.state} ({state.reason}), the process ended with {end}"
            assert end.code in (0, None), f"a run that is done ended with code {end.code}"
        pids = {_pid(study, i) for i in range(2)}
        assert len(pids | {os.getpid()}) == 3, f"the runs had the processes {pids}, the test has {os.getpid()}"

    def test_a_run_that_has_ended_is_not_run_again(self, tmp_path: Path) -> None:
        """Submitting it once more is harmless."""
        study = self.study(tmp_path)
        name = study.runs[0].hash
        with self.opened(study) as executor:
            executor.submit(name)
            self.wait(executor, 1)
            before = read_journal(study.folder, name)
            executor.submit(name)
            self.wait(executor, 1)
        assert read_journal(study.folder, name) == before, "a run that was done was run again"

    def test_stop_saves_what_is_under_way(self, tmp_path: Path) -> None:
        """The process finishes its step, saves and ends; the run is pending, so that it can go on."""
        study = self.study(tmp_path, steps=_LONG)
        name = study.runs[0].hash
        with self.opened(study) as executor:
            executor.submit(name)
            _until(lambda: (study.runs[0].path / "checkpoint.pt").exists(), "the run has no checkpoint")
            executor.stop()
            self.wait(executor, 1)
        state = read_state(study.folder, name).state
        assert state == "pending", f"a run that was stopped is {state}"
        assert read_journal(study.folder, name)[-1]["what"] == "stopped", "the run was not asked to stop, but ended"

    def test_a_process_that_is_killed_is_told(self, tmp_path: Path) -> None:
        """As a failure with a code or a reason, or as one to start again; never as a success."""
        study = self.study(tmp_path, steps=_LONG)
        with self.opened(study) as executor:
            executor.submit(study.runs[0].hash)
            _until(lambda: (study.runs[0].path / "checkpoint.pt").exists(), "the run has no checkpoint")
            os.kill(_pid(study, 0), signal.SIGKILL)
            (end,) = self.wait(executor, 1)
        assert end.run == study.runs[0].hash
        assert end.code != 0, f"a killed process was told as {end}"

    def test_close_ends_what_is_left(self, tmp_path: Path) -> None:
        """No process outlives the executor."""
        study = self.study(tmp_path, steps=_LONG)
        with self.opened(study) as executor:
            executor.submit(study.runs[0].hash)
            _until(lambda: (study.runs[0].path / "checkpoint.pt").exists(), "the run has no checkpoint")
            pid = _pid(study, 0)
        _until(lambda: not _alive(pid), f"process {pid} of a run is alive after close")

    def test_closing_is_always_possible(self, tmp_path: Path) -> None:
        """Twice, and without having been opened: the runner closes after errors too."""
        executor: Executor = self.build()
        executor.close()
        executor.open(self.study(tmp_path).folder, threads=1)
        executor.close()
        executor.close()

    def test_has_at_least_one_worker(self) -> None:
        """How many runs may be under way."""
        executor: Executor = self.build()
        assert executor.workers >= 1


def _pid(study: Study, index: int) -> int:
    journal: Sequence[dict[str, object]] = read_journal(study.folder, study.runs[index].hash)
    return int(str(journal[-1]["pid"]))


def _alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _until(condition: Callable[[], bool], message: str) -> None:
    limit = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"{message} after {_PATIENCE:g} seconds"
        time.sleep(0.02)
