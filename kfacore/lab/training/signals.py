"""Ctrl-C and SIGTERM: the first asks the run to stop after the step, the second stops it at once."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from kfacore.errors import KfacError

if TYPE_CHECKING:
    from kfacore.parallel.ranks import Ranks

__all__ = ["Interrupted", "StopSignals", "Terminated", "heard_signals", "resume_command"]


def resume_command(run: Path) -> str:
    """The command that continues a run, ready to paste into a shell."""
    return f"kfac train --resume {shlex.quote(str(run))}"


@contextmanager
def heard_signals() -> Iterator[None]:
    """While active, a new process hears SIGINT and SIGTERM even if this one was told to ignore them.

    Who starts us in the background (``make test &`` in a script, some CI runners) may have SIGINT ignored, and what is
    ignored stays so in every process started from here, which could then not be stopped by it. What has a handler goes
    back to the default in a new program, so the handler need not do anything. In a thread other than the main one
    Python allows no handlers; there it does nothing.
    """
    ignored = []
    if threading.current_thread() is threading.main_thread():
        ignored = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


class Interrupted(KfacError):  # noqa: N818  # stopping is not an error
    """The run was stopped by Ctrl-C and is saved.

    Attributes:
        run: The run folder.
        step: The step after which it stopped.
        resume: The command that continues it.
    """

    exit_code: ClassVar[int] = 130
    cause: ClassVar[str] = "Ctrl-C"

    def __init__(self, run: Path, step: int) -> None:
        self.run = run
        self.step = step
        self.resume = resume_command(run)
        # The command has a line of its own, so that a double or triple click copies it and nothing else.
        super().__init__(f"stopped by {self.cause} after step {step}; everything is saved. Go on with:\n{self.resume}")


class Terminated(Interrupted):
    """The run was stopped by SIGTERM and is saved."""

    exit_code: ClassVar[int] = 143
    cause: ClassVar[str] = "SIGTERM"


class StopSignals:
    """While active, the first SIGINT or SIGTERM sets `received`; a second one ends the process's work at once.

    In a thread other than the main one Python allows no handlers; there it does nothing.

    Attributes:
        received: The signal that asked to stop, or None.
    """

    received: signal.Signals | None

    def __init__(self) -> None:
        self.received = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGTERM:
            raise SystemExit(Terminated.exit_code)
        else:
            raise KeyboardInterrupt

    def hear(self, ranks: Ranks) -> None:
        """Take up a signal that another process of the run has received: all stop after the same step."""
        number = ranks.most("signals", 0 if self.received is None else int(self.received))
        if number and self.received is None:
            self.received = signal.Signals(number)

    def exception(self, run: Path, step: int) -> Interrupted:
        """What to raise once the run is saved."""
        return (Terminated if self.received == signal.SIGTERM else Interrupted)(run, step)
