"""Runs of a study as processes on this machine. Imports no torch."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, ClassVar

from kfac_plugins.executors import LocalConfig
from kfacore.errors import ResourceError
from kfacore.lab.studies.state import state_folder
from kfacore.lab.training.signals import heard_signals
from kfacore.roles import Ended, Executor
from kfacore.schema.slots import SlotConfig

__all__ = ["Local"]

_CLOSE_SECONDS = 10.0
_ATTEMPTS = 3


class Local(Executor):
    """A process for each run, forked from one that has imported torch (`kfacore.lab.studies.zygote`), or spawned.

    The processes are in sessions of their own, so that Ctrl-C in the terminal reaches the study's runner alone. If the
    runner is killed, they notice and stop after their step, saved.
    """

    Config: ClassVar[type[SlotConfig]] = LocalConfig
    config: LocalConfig

    def __init__(self, config: SlotConfig | None = None) -> None:
        super().__init__(config)
        self._starter: _Starter | None = None

    def open(self, study: Path, *, threads: int) -> None:
        """Start the process that forks the runs, if they are to be forked."""
        start = self.config.start
        if start == "auto":
            start = "fork" if sys.platform == "linux" else "spawn"
        if start == "fork" and not hasattr(os, "fork"):
            raise ResourceError("this system cannot fork processes; set executor.start = spawn")
        self._starter = (_Forks if start == "fork" else _Spawns)(study, threads)

    def submit(self, run: str) -> None:
        """Start a process."""
        self._open.submit(run)

    def poll(self, timeout: float) -> Sequence[Ended]:
        """Processes that have ended."""
        return self._open.poll(timeout)

    def stop(self) -> None:
        """SIGTERM to every process."""
        self._open.send(signal.SIGTERM)

    def close(self) -> None:
        """SIGKILL to what is left."""
        if self._starter is not None:
            self._starter.close()
            self._starter = None

    @property
    def _open(self) -> _Starter:
        if self._starter is None:
            raise ValueError("an executor must be opened first")
        return self._starter


class _Starter(ABC):
    """One of the two ways to make a process."""

    def __init__(self, study: Path, threads: int) -> None:
        self.study = study.resolve()
        # Before torch is imported; the run sets its threads itself, but libraries beside torch read only these.
        count = str(threads)
        self.environ = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}

    @abstractmethod
    def submit(self, run: str) -> None: ...

    @abstractmethod
    def poll(self, timeout: float) -> Sequence[Ended]: ...

    @abstractmethod
    def send(self, number: signal.Signals) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class _Forks(_Starter):
    """Processes from `kfacore.lab.studies.zygote`, which is started again if it dies."""

    def __init__(self, study: Path, threads: int) -> None:
        super().__init__(study, threads)
        self.server: subprocess.Popen[bytes] | None = None
        self.under_way: set[str] = set()
        self.deaths = 0
        self.buffer = b""
        self._launch()

    def _launch(self) -> None:
        log = self.study / "state" / "zygote.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as errors, heard_signals():
            self.server = subprocess.Popen(
                [sys.executable, "-m", "kfacore.lab.studies.zygote", str(self.study)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.environ,
                start_new_session=True,
            )
        self.buffer = b""

    def submit(self, run: str) -> None:
        if self.server is None:
            self._launch()
        if self._order({"run": run}):
            self.under_way.add(run)
            return
        self._died()
        self._launch()
        if not self._order({"run": run}):
            raise ResourceError(f"no process can be started; see {self.study / 'state' / 'zygote.txt'}")
        self.under_way.add(run)

    def poll(self, timeout: float) -> Sequence[Ended]:
        if self.server is None:
            time.sleep(timeout)
            return ()
        output = _pipe(self.server.stdout)
        ready, _, _ = select.select([output], [], [], timeout)
        if not ready:
            return ()
        chunk = os.read(output.fileno(), 65536)
        if not chunk:
            return self._died()
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        ended = []
        for line in lines:
            answer = json.loads(line)
            if "code" in answer:
                self.under_way.discard(answer["run"])
                self.deaths = 0
                ended.append(Ended(answer["run"], answer["code"]))
        return ended

    def send(self, number: signal.Signals) -> None:
        if self.server is not None:
            self._order({"signal": int(number)})

    def close(self) -> None:
        if self.server is None:
            return
        self._order({"signal": int(signal.SIGKILL)})
        _pipe(self.server.stdin).close()
        try:
            self.server.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        _pipe(self.server.stdout).close()
        self.server = None

    def _order(self, content: dict[str, object]) -> bool:
        """Send one order; False if the server is gone."""
        if self.server is None:
            return False
        pipe = _pipe(self.server.stdin)
        try:
            pipe.write(json.dumps(content).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            return False
        return True

    def _died(self) -> Sequence[Ended]:
        """The server is gone; its children notice by themselves and save."""
        if self.server is None:
            return ()
        code = self.server.wait()
        for pipe in (self.server.stdin, self.server.stdout):
            try:
                _pipe(pipe).close()
            except BrokenPipeError:
                continue
        self.server = None
        self.deaths += 1
        log = self.study / "state" / "zygote.txt"
        if self.deaths >= _ATTEMPTS:
            raise ResourceError(
                f"the process that starts the runs has ended {self.deaths} times with code {code}; {log} may say why"
            )
        ended = [
            Ended(run, None, f"the process that starts the runs has ended with code {code}", again=True)
            for run in sorted(self.under_way)
        ]
        self.under_way.clear()
        return ended


class _Spawns(_Starter):
    """A new interpreter for every run."""

    def __init__(self, study: Path, threads: int) -> None:
        super().__init__(study, threads)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, run: str) -> None:
        folder = state_folder(self.study, run)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "ab") as log, heard_signals():
            self.processes[run] = subprocess.Popen(
                [sys.executable, "-m", "kfacore.lab.studies.worker", str(self.study), run],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )

    def poll(self, timeout: float) -> Sequence[Ended]:
        limit = time.monotonic() + timeout
        while True:
            ended = [
                Ended(run, code) for run, process in self.processes.items() if (code := process.poll()) is not None
            ]
            for end in ended:
                del self.processes[end.run]
            if ended or time.monotonic() >= limit:
                return ended
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        for process in self.processes.values():
            process.send_signal(number)

    def close(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        self.processes.clear()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without pipes")
    return pipe
