"""The runner of a study: starts what is pending, sees what has ended, and goes on until nothing is left.

It trains nothing itself and imports no torch. Everything it knows lies in the study folder, so it may be killed and
started again at any moment, and several runners, on one machine or on several, may work on one folder.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacore.lab.studies.claims import STALE_SECONDS, Claim, ClaimWatch, read_holder
from kfacore.lab.studies.folder import plan_into, write_planned
from kfacore.lab.studies.plan import PlannedRun, Study
from kfacore.lab.studies.planner import Plan
from kfacore.lab.studies.state import BUSY, STOPPED, RunState, clear_outcome, read_state, state_folder, write_outcome
from kfacore.lab.studies.tuning import choose, drop_choice, write_choice
from kfacore.lab.training.signals import StopSignals

if TYPE_CHECKING:
    from kfacore.lab.studies.config import StudyConfig
    from kfacore.registry import Registry
    from kfacore.roles import Executor

__all__ = ["Listener", "StudyResult", "run_study"]

Listener = Callable[[Mapping[str, Any]], None]
"""Is told every event of a study: ``study``, ``started``, ``progress``, ``ended``, ``tuned``, ``done``."""

_LOOK_SECONDS = 0.5
"""How long the runner waits for a process to end before it looks around again."""

_LIVES = 3
"""How often a run may end without an outcome in one session before it counts as failed."""


@dataclass(frozen=True)
class StudyResult:
    """How a study ended.

    Attributes:
        study: The study with the final states.
        stopped: The signal that stopped it, or None.
        failures: Runs that failed or diverged. Of those for tuning only the failed ones: a setting that diverges has
            lost the comparison it was made for, one that crashed was never compared.
        lost: (variant, problem) pairs without runs, because no tuning run succeeded.
    """

    study: Study
    stopped: signal.Signals | None
    failures: tuple[PlannedRun, ...]
    lost: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every run has ended well."""
        ended = all(run.state == "done" for run in self.study.runs)
        return self.stopped is None and not self.lost and not self.failures and ended


def run_study(
    registry: Registry,
    config: StudyConfig,
    folder: Path,
    *,
    origin: str = "study",
    data_dir: str | None = None,
    fail_fast: bool = False,
    retry_failed: bool = False,
    stale_seconds: float = STALE_SECONDS,
    listeners: Sequence[Listener] = (),
) -> StudyResult:
    """Execute what is left of a study.

    Args:
        registry: Where the components are.
        config: The study file.
        folder: The study folder.
        origin: The file's name, for messages.
        data_dir: Folder of the data files of all problems.
        fail_fast: Stop the study when a run fails or diverges.
        retry_failed: Try failed runs again, from their checkpoints. Diverged ones would diverge again.
        stale_seconds: How long a run of another machine may show no sign of life before it is taken over.
        listeners: Are told every event.

    Returns:
        The end of the study.

    Raises:
        ConfigError: Something is wrong with the file, or the folder holds another study; nothing has been written.
        ResourceError: The disk or the executor refused; what has been done is kept.
    """
    plan = plan_into(registry, config, folder, origin=origin, data_dir=data_dir)
    executor = registry.build("executor", config.executor)

    def replan() -> Plan:
        return plan_into(registry, config, folder, origin=origin, data_dir=data_dir)

    runner = _Runner(plan, replan, executor, ClaimWatch(stale_seconds), fail_fast, listeners)
    return runner.go(retry_failed=retry_failed)


class _Runner:
    """One life of a study's runner."""

    def __init__(
        self,
        plan: Plan,
        replan: Callable[[], Plan],
        executor: Executor,
        watch: ClaimWatch,
        fail_fast: bool,
        listeners: Sequence[Listener],
    ) -> None:
        self.plan = plan
        self.replan = replan
        self.executor = executor
        self.watch = watch
        self.fail_fast = fail_fast
        self.listeners = listeners
        self.folder = plan.study.folder
        self.states: dict[str, RunState] = {}
        self.mine: set[str] = set()
        self.lives: dict[str, int] = {}
        self.lost: list[tuple[str, str]] = []
        self.stopping = False
        self.steps: dict[str, int] = {}
        self._written = ""

    @property
    def runs(self) -> dict[str, PlannedRun]:
        """Everything to be executed by hash, tuning first; a run that two variants share is there once."""
        runs = [run for tuning in self.plan.tunings for run in tuning.runs]
        found: dict[str, PlannedRun] = {}
        for run in [*runs, *self.plan.study.runs]:
            found.setdefault(run.hash, run)
        return found

    def go(self, *, retry_failed: bool) -> StudyResult:
        """Run the study to its end, or until a signal stops it."""
        self._publish()
        self._refresh()
        if retry_failed:
            self._forget_failures()
        self._tune()  # what was left undone, or is to be done again, need not leave anything to run
        self._emit("study", total=self.plan.total, workers=self.executor.workers, **self._counts())
        stop = StopSignals()
        with stop:
            if self._left():
                self.executor.processes = self.plan.study.processes
                self.executor.open(self.folder, threads=self.plan.study.threads)
                try:
                    self._loop(stop)
                finally:
                    self.executor.close()
                    self._publish()
        self._refresh()
        self._publish()
        study = self.plan.study.refreshed()
        failures = tuple(run for run in study.runs if run.state in ("failed", "diverged"))
        tried = study.as_found([run for tuning in self.plan.tunings for run in tuning.runs])
        known = {run.hash for run in study.runs}
        failures += tuple(run for run in tried if run.state == "failed" and run.hash not in known)
        self._emit("done", stopped=None if stop.received is None else stop.received.name, **self._counts())
        return StudyResult(study, stop.received, failures, tuple(self.lost))

    def _loop(self, stop: StopSignals) -> None:
        while self._left():
            if stop.received is not None and not self.stopping:
                self._stop()
            if self.stopping and not self.mine:
                return
            if not self.stopping:
                self._start()
            before = len(self.mine)
            for ended in self.executor.poll(_LOOK_SECONDS):
                self.mine.discard(ended.run)
                self._settle(ended.run, ended.code, ended.reason, again=ended.again)
            self._progress()
            self._refresh()
            self._tune()
            if len(self.mine) != before:
                self._publish()

    def _left(self) -> bool:
        """Whether anything has not ended."""
        return bool(self.mine) or any(not self.states[name].ended for name in self.runs)

    def _refresh(self) -> None:
        """Read the states of runs that had not ended, and tell the ends of those that other runners execute."""
        for name, run in self.runs.items():
            before = self.states.get(name)
            if before is not None and before.ended:
                continue
            now = read_state(self.folder, name)
            self.states[name] = now
            if before is not None and now.ended:
                self._tell_end(run, now)

    def _start(self) -> None:
        """Start pending runs while there is room."""
        for name, run in self.runs.items():
            if len(self.mine) >= self.executor.workers:
                return
            state = self.states[name]
            if name in self.mine or state.ended:
                continue
            if state.state == "running" and not self._take_over(name):
                continue
            write_planned(self.plan.study, run)
            self.executor.submit(name)
            self.mine.add(name)
            self._emit("started", **_names(run), shared=len(self.mine) > 1)
            self._publish()

    def _take_over(self, name: str) -> bool:
        """Free a run whose process, on another machine, shows no sign of life any more."""
        folder = state_folder(self.folder, name)
        holder = read_holder(folder)
        if holder is None or holder.gone:
            return True
        if not self.watch.stale(name, holder):
            return False
        claim = Claim.take(folder, stale=lambda found: found.number == holder.number)
        if claim is None:
            return False
        claim.release()
        return True

    def _settle(self, name: str, code: int | None, reason: str, *, again: bool) -> None:
        """Look at how a process of ours has ended; if it could not say, say it for it."""
        state = read_state(self.folder, name)
        if state.ended or code == BUSY or again or self.stopping or code in STOPPED:
            if not state.ended and code != BUSY and not self.stopping:
                self.lives[name] = self.lives.get(name, 0) + 1
                if self.lives[name] >= _LIVES:
                    self._fail(name, f"it was started {_LIVES} times and never ended: {reason or f'exit code {code}'}")
            return
        log = state_folder(self.folder, name).relative_to(self.folder) / "log.txt"
        self._fail(name, f"{reason or _death(code)} (output in {log})")

    def _fail(self, name: str, reason: str) -> None:
        """Write the outcome of a run whose process is gone, unless somebody else executes it by now."""
        claim = Claim.take(state_folder(self.folder, name))
        if claim is None:
            return
        try:
            if not read_state(self.folder, name).ended:
                write_outcome(self.folder, name, RunState("failed", reason))
        finally:
            claim.release()

    def _forget_failures(self) -> None:
        """Failed runs are pending again, and a choice that was made without one of them is made again."""
        forgotten = set()
        for name in self.runs:
            if self.states[name].state != "failed":
                continue
            claim = Claim.take(state_folder(self.folder, name))
            if claim is not None:
                clear_outcome(self.folder, name)
                claim.release()
                self.states[name] = RunState("pending")
                forgotten.add(name)
        unsettled = [tuning for tuning in self.plan.tunings if any(run.hash in forgotten for run in tuning.runs)]
        if unsettled:
            drop_choice(self.folder, unsettled)
            self.plan = self.replan()
            self._refresh()

    def _tell_end(self, run: PlannedRun, state: RunState) -> None:
        tuning = self._tuning_of(run.hash)
        self._emit("ended", **_names(run), state=state.state, reason=state.reason, tuning=tuning, **self._counts())
        if self.fail_fast and not tuning and state.state != "done" and not self.stopping:
            self._stop()

    def _stop(self) -> None:
        """Ask our processes to save and end; nothing more is started."""
        self.stopping = True
        self.executor.stop()
        self._emit("stopping", under_way=len(self.mine))

    def _tune(self) -> None:
        """Make the choices whose tuning runs have all ended, and plan the runs that waited for them."""
        waiting = set(self.plan.waiting) - set(self.lost)
        changed = False
        for tuning in self.plan.tunings:
            key = (tuning.variant, tuning.problem)
            if key not in waiting or not all(self.states[run.hash].ended for run in tuning.runs):
                continue
            chosen = choose(self.folder, tuning)
            if chosen is None:
                self.lost.append(key)
                self._emit("tuned", variant=key[0], problem=key[1], chosen=None)
                continue
            chosen = write_choice(self.folder, tuning, chosen)
            self._emit("tuned", variant=key[0], problem=key[1], chosen=chosen)
            changed = True
        if changed:
            self.plan = self.replan()
            self._refresh()
            self._publish()

    def _tuning_of(self, name: str) -> bool:
        return name not in {run.hash for run in self.plan.study.runs}

    def _progress(self) -> None:
        """Tell how far the runs of ours are that have moved."""
        for name in sorted(self.mine):
            run = self.runs[name]
            event = last_event(run.path)
            if event is not None and event["step"] != self.steps.get(name):
                self.steps[name] = event["step"]
                numbers = {key: event.get(key) for key in ("step", "seconds", "loss", "error")}
                self._emit("progress", **_names(run), **numbers, steps=run.config["steps"])

    def _publish(self) -> None:
        """Write ``study.json`` and ``index.json``, unless another runner has extended the study."""
        study = self.plan.study
        mine = json.dumps(study.as_dict(), sort_keys=True)
        if self._written:
            try:
                there = json.dumps(json.loads(study.study_file.read_text(encoding="utf-8")), sort_keys=True)
            except (OSError, ValueError):
                there = self._written
            if there not in (self._written, mine):
                return
        if mine != self._written:
            study.write()
            self._written = json.dumps(json.loads(study.study_file.read_text(encoding="utf-8")), sort_keys=True)
        runs = [
            replace(run, state=state.state, reason=state.reason) if (state := self.states.get(run.hash)) else run
            for run in study.runs
        ]
        replace(study, runs=tuple(runs)).write_index()

    def _counts(self) -> dict[str, int]:
        """How many runs are in each state, those that wait for their tuning among the pending ones."""
        counts = dict.fromkeys(("pending", "running", "done", "failed", "diverged"), 0)
        for name in self.runs:
            state = self.states[name].state
            counts["running" if name in self.mine and state == "pending" else state] += 1
        counts["pending"] += len(set(self.plan.waiting) - set(self.lost)) * len(self.plan.study.seeds)
        return counts

    def _emit(self, event: str, **facts: Any) -> None:
        content = {"event": event, "time": round(time.time(), 3), "name": self.plan.study.name, **facts}
        for listener in self.listeners:
            listener(content)


def last_event(run: Path) -> dict[str, Any] | None:
    """The last whole event of a run that is being written, from the end of its file; None if there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "step":
            return event
    return None


def _names(run: PlannedRun) -> dict[str, Any]:
    return {"run": run.hash, "variant": run.variant, "problem": run.problem, "seed": run.seed}


def _death(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "the process is gone"
    if code >= 0:
        return f"the process ended with exit code {code} and without a word"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "killed by SIGKILL: by the system for lack of memory, or by hand"
    return f"killed by {name}"
