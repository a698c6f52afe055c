"""The training loop: batches in, steps taken, events out, and a run folder from which it can always go on."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kfacore.errors import ConfigError, DataError, NumericalError, ResourceError
from kfacore.lab.training.batches import BatchSampler, BatchSchedule
from kfacore.lab.training.checkpoint import Best, Checkpoint, load_checkpoint, save_best, save_checkpoint
from kfacore.lab.training.evaluate import evaluate_all, evaluation_due, spread
from kfacore.lab.training.files import disk_errors, tracebacks
from kfacore.lab.training.notices import NoticeLog
from kfacore.lab.training.outcome import Losses
from kfacore.lab.training.plots import draw_run
from kfacore.lab.training.processes import joined
from kfacore.lab.training.progress import Progress
from kfacore.lab.training.results import RunResult, read_scalars
from kfacore.lab.training.resume import warn_of_changes
from kfacore.lab.training.run import RunFolder, default_folder
from kfacore.lab.training.setup import Parts, build_together, load_states, manifest, method_of
from kfacore.lab.training.signals import StopSignals, resume_command
from kfacore.parallel.cores import torch_threads
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.roles import Sink

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["Event", "Listener", "train"]

logger = logging.getLogger("kfacore.lab.training")

Event = Mapping[str, Any]
"""One event of a run: ``{"event": "step", "step": 3, ...}``, plain Python values."""

Listener = Callable[[Event], None]
"""Is told every event, after the sinks."""


def train(
    config: RunConfig,
    *,
    registry: Registry,
    out: Path | None = None,
    resume: Path | None = None,
    init: Path | None = None,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Train a model and keep everything about it in a run folder.

    Args:
        config: The resolved configuration; for `resume` see `kfacore.lab.training.resume.resume_config`.
        registry: Where the components are.
        out: The run folder, which must not hold a run; by default a new one under ``runs``.
        resume: The folder of a run to continue, in place of `out`.
        init: Parameters to start from.
        listeners: Are told every event.

    Returns:
        The end of the run; its `verdict` says whether it fell apart, with finite numbers to the end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run is saved.
        NumericalError: The loss or the parameters are no longer finite; the last good checkpoint is kept.
        ResourceError: The disk refused; the last checkpoint is intact.
        KfacError: Something is wrong with the configuration or the data; nothing has been written.
    """
    if resume is not None and (out is not None or init is not None):
        raise ConfigError("a resumed run keeps its folder and parameters; leave out --out and --init")
    with torch_threads(config.threads), joined(config.device) as ranks:
        new = str(default_folder(config.problem.kind, method_of(config)))  # named by one clock
        folder = RunFolder(resume or out or Path(ranks.gather("folder", new)[0]))
        first = ranks.rank == 0
        try:
            with ranks.together("start"):
                if first and resume is None:
                    folder.check_free()
                if first and resume is not None:
                    folder.lock()
                checkpoint = load_checkpoint(folder.checkpoint_file) if resume is not None else None
            parts = build_together(config, registry, init, ranks)
            run = _Run(config, registry, folder, parts, listeners, ranks)
            with ranks.together("run folder"):
                if checkpoint is not None:
                    run.restore(checkpoint)
                elif first:
                    folder.create(config.as_dict(), manifest(config, registry, parts, _now(), ranks.size))
            with StopSignals() as stop, tracebacks(folder.path):
                return run.go(stop)
        finally:
            folder.unlock()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Run:
    """One life of a run: from a start or a checkpoint to its end or an interruption."""

    def __init__(
        self,
        config: RunConfig,
        registry: Registry,
        folder: RunFolder,
        parts: Parts,
        listeners: Sequence[Listener],
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.first = ranks.rank == 0  # the one that writes and tells
        self.config = config
        self.folder = folder
        self.parts = parts
        self.listeners = listeners if self.first else ()
        self.sinks: list[Sink] = [registry.build("sink", sink) for sink in config.sink] if self.first else []
        batch = config.batch
        schedule = BatchSchedule(batch.schedule, len(parts.train), batch.start, batch.target_step, batch.hold)
        self.sampler = BatchSampler(parts.train, schedule, config.seed, batch.sampling)
        self.notices = NoticeLog()
        self.step = 0
        self.seconds = 0.0
        self.cases = 0
        self.evaluated: int | None = None
        self.measures: dict[str, float | None] = {}
        self.saved: int | None = None
        self.progress = Progress()
        self._evaluated_on = spread(parts.train, config.eval.cases), spread(parts.test, config.eval.cases)
        self._kept: tuple[int, int | None] | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up where a checkpoint left off."""
        parts, folder = self.parts, self.folder
        if checkpoint.step > self.config.steps:
            raise ConfigError(
                f"{folder.path} has already taken {checkpoint.step} steps; --steps is the total, give more than that"
            )
        if checkpoint.data != parts.data.checksum:
            raise DataError(
                f"the data has changed since {folder.path} was started (checksum {parts.data.checksum[:12]}, then "
                f"{checkpoint.data[:12]}); restore the old data or start a new run"
            )
        record = folder.read_manifest()
        load_states(parts, checkpoint, folder.checkpoint_file)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.cases = sum(map(self.sampler.schedule.size, range(1, self.step + 1)))
        self.evaluated, self.saved = checkpoint.evaluated, checkpoint.step
        self._kept = (self.step, self.evaluated)
        self.progress = Progress.of(checkpoint.progress, folder)
        if not self.first:
            return
        warn_of_changes(record, parts.device_name, self.ranks.size)
        life = {"step": self.step, "time": _now(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        if not self.ranks.alone:
            life["processes"] = self.ranks.size
        record["resumed"] = [*record.get("resumed", []), life]
        folder.write_config(self.config.as_dict())
        folder.write_manifest(record)

    def go(self, stop: StopSignals) -> RunResult:
        """Train to the last step."""
        config, folder = self.config, self.folder
        try:
            with self.ranks.together("sinks"):
                for sink in self.sinks:
                    with self._disk():
                        sink.open(folder.path, step=self.step)
                self._emit(self._start_event())
            if self._evaluates(self.step):
                self._evaluate()
            self._save()
            stop.hear(self.ranks)
            while not self._over():
                if stop.received is None:
                    self._advance()
                    stop.hear(self.ranks)
                if stop.received is not None:
                    self._save()
                    raise stop.exception(folder.path, self.step)
                if self._evaluates(self.step):
                    self._evaluate()
                if self._over() or self._due(config.checkpoint.every):
                    self._save()
            return self._finish()
        except NumericalError as error:
            explained = self.progress.explain(error, self.step, self.saved, folder, config.as_dict())
            ended = {"event": "diverged", "step": self.step, "seconds": self.seconds, "reason": str(explained)}
            self._emit(ended)
            raise explained from error
        finally:
            with contextlib.ExitStack() as closing:  # each is closed, whatever another one does
                for sink in self.sinks:
                    closing.enter_context(self._disk())
                    closing.callback(sink.close)

    def _advance(self) -> None:
        """One step, timed, with its report read and passed on."""
        started = time.perf_counter()
        step = self.step + 1
        size = self.sampler.schedule.size(step)
        batch = self.sampler.batch(step, part=(self.ranks.rank, self.ranks.size))
        report = self.parts.optimizer.step(batch.inputs, batch.targets)
        if self.parts.average is not None:
            self.parts.average.update(self.parts.model, step)
        scalars = read_scalars(report)
        spent = int(1e9 * (time.perf_counter() - started))
        self.seconds += self.ranks.most("seconds", spent) / 1e9  # one clock, for budgets
        self.step = step
        self.cases += size
        extra: dict[str, Any] = {"notices": list(report.notices)} if report.notices else {}
        if scalars["rho"] == -math.inf:  # which files of events cannot hold
            extra["increased"] = True
        if scalars.pop("undone", None):
            extra["rejected"] = True
        self.progress.take(scalars, rejected="rejected" in extra)
        self._emit(
            {
                "event": "step",
                "step": step,
                "batch_size": size,
                **scalars,
                "seconds": self.seconds,
                **extra,
            }
        )
        self.notices.take(step, report.notices)
        loss = scalars["loss"]
        if loss is None or not math.isfinite(loss):
            raise NumericalError(
                f"the loss of step {step} is {loss} (lambda {_show(scalars['lam'])}, gamma {_show(scalars['gamma'])})"
            )

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation is due now and not done yet (a resumed run may have stopped just before one)."""
        every, early = self.config.eval.every, self.config.eval.early
        return self.evaluated != step and (self._over() or evaluation_due(step, every, early=early))

    def _over(self) -> bool:
        """Whether the last step has been taken: all of them, or as many as the budget allows."""
        budget = self.config.budget
        return (
            self.step >= self.config.steps
            or (budget.cases is not None and self.cases >= budget.cases)
            or (budget.seconds is not None and self.seconds >= budget.seconds)
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate(self) -> None:
        parts = self.parts
        averaged = None if parts.average is None else parts.average.model
        self.measures = evaluate_all(parts.model, averaged, parts.likelihood, *self._evaluated_on, ranks=self.ranks)
        self.evaluated = self.step
        self._emit({"event": "eval", "step": self.step, **self.measures, "seconds": self.seconds})
        loss = self.measures["train_loss"]
        best = self.progress.measure(self.step, math.nan if loss is None else loss)
        if loss is None or not math.isfinite(loss):
            raise NumericalError(f"the training loss after step {self.step} is {loss}")
        if best:
            self._require_finite()
            config, data = self.config.as_dict(), parts.data.checksum
            content = Best(parts.model.state_dict(), self.step, loss, config, data)
            with self.ranks.together("best parameters"):
                if self.first:
                    save_best(self.folder.best_file, content, remedy=self._remedy())

    def _save(self) -> None:
        """Write a checkpoint, unless it would replace a good one by numbers that are not finite."""
        state = (self.step, self.evaluated)
        if self._kept == state:
            return
        parts = self.parts
        self._require_finite()
        content = Checkpoint(
            model=parts.model.state_dict(),
            optimizer=parts.optimizer.state_dict(),  # of all processes together
            averaged=None if parts.average is None else parts.average.state_dict(),
            step=self.step,
            seconds=self.seconds,
            evaluated=self.evaluated,
            config=self.config.as_dict(),
            data=parts.data.checksum,
            progress=self.progress.as_dict(),
        )
        with self.ranks.together("checkpoint"):
            for sink in self.sinks:
                with self._disk():
                    sink.flush()  # first, so that no event before the checkpoint can be missing after a crash
            if self.first:
                save_checkpoint(self.folder.checkpoint_file, content, remedy=self._remedy())
        self.saved, self._kept = self.step, state
        path = str(self.folder.checkpoint_file)
        self._emit({"event": "checkpoint", "step": self.step, "path": path, "seconds": self.seconds})

    def _require_finite(self) -> None:
        finite = torch.stack([parameter.isfinite().all() for parameter in self.parts.model.parameters()]).all()
        if not bool(finite):
            raise NumericalError(f"the parameters after step {self.step} hold NaN or infinity")

    def _finish(self) -> RunResult:
        self._save()
        with self.ranks.together("end"):
            return self._told()

    def _told(self) -> RunResult:
        """The end of the run, with its pictures where the first process looks back at it."""
        parts, folder = self.parts, self.folder
        for sink in self.sinks:
            with self._disk():
                sink.flush()
        events = folder.events() if self.first else []
        if not self.measures:  # everything was done before this life began; its last evaluation is on file
            names = [f"{prefix}{name}" for prefix in ("", "averaged_") for name in _MEASURES]
            last: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "eval"), {})
            self.measures = {name: last.get(name) for name in names}
        wanted = self.config.pictures
        plots = draw_run(folder, events, parts) if events and wanted else ()
        if not events and wanted and self.first:
            logger.warning("no plots: the jsonl sink, which keeps the events for them, is switched off")
        best = folder.best_file if folder.best_file.exists() else None
        if self.progress.losses.last is None:  # the checkpoint is of a version that did not keep them
            self.progress.losses = Losses.of(events)
        losses, rejected = self.progress.losses, self.progress.rejected
        advice = self.progress.advice(self.config.as_dict()) if losses.verdict == "diverged" else ""
        self._emit(
            {
                "event": "done",
                "step": self.step,
                "seconds": self.seconds,
                **self.measures,
                "run": str(folder.path),
                "plots": [str(plot) for plot in plots],
                "notices": dict(self.notices.counts),
                "verdict": losses.verdict,
                "losses": losses.as_dict(),
                "rejected": rejected,
                "best": None if best is None else str(best),
                **({"advice": advice} if advice else {}),
            }
        )
        return RunResult(
            folder.path, self.step, self.seconds, self.measures, tuple(plots), losses, rejected, best, advice
        )

    def _start_event(self) -> dict[str, Any]:
        config, parts = self.config, self.parts
        return {
            "event": "start",
            "step": self.step,
            "steps": config.steps,
            "run": str(self.folder.path),
            "problem": config.problem.kind,
            "optimizer": config.optimizer.kind,
            "approx": None if config.approx is None else config.approx.kind,
            "device": parts.device_name,
            "threads": torch.get_num_threads(),
            "dtype": config.dtype,
            "seed": config.seed,
            "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
            "train_cases": len(parts.train),
            "test_cases": 0 if parts.test is None else len(parts.test),
            "data": parts.data.source,
            "rejected": self.progress.rejected,
            "seconds": self.seconds,
        }

    def _emit(self, event: Event) -> None:
        for sink in self.sinks:
            with self._disk():
                sink.write(event)
        for listener in self.listeners:
            listener(event)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say how to go on, also where a sink has already said what is wrong."""
        try:
            with disk_errors(self.folder.path):
                yield
        except ResourceError as error:
            remedy = self._remedy()
            raise ResourceError(f"{error}; {remedy}" if remedy else str(error)) from error

    def _remedy(self) -> str:
        if self.saved is None:
            return ""
        return f"the checkpoint of step {self.saved} is intact, go on with:\n{resume_command(self.folder.path)}"


_MEASURES = ("train_loss", "train_error", "test_loss", "test_error")


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
