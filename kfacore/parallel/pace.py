"""The pace of work that goes on beside training: a little in every step instead of all at once.

Work on another thread competes with the steps for the cores: a refresh that begins at once slows the next few steps to
a multiple. Between two factorisations the worker therefore asks how much of the work the steps have granted so far, and
rests until it is enough. Only the moment at which something is computed depends on this, never what is computed.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

__all__ = ["Pace", "current_pace"]

_LOOK = 0.2
"""Seconds after which a resting thread looks whether the process is about to end."""

_PATIENCE = 60.0
"""Seconds of rest after which a thread goes on unasked: its optimizer may have been thrown away."""

_local = threading.local()


class Pace:
    """Counts the work that its thread shares out while active, and holds it back if a total to spread is given.

    Args:
        steps: Steps over which the work is spread.
        total: Operations expected in all, or None to hold nothing back.

    Attributes:
        done: Operations so far.
    """

    def __init__(self, steps: int = 1, total: float | None = None) -> None:
        self.done = 0.0
        self._share = None if not total else total / steps
        self._granted = 0.0
        self._condition = threading.Condition()

    def grant(self) -> None:
        """One more step's share may be done."""
        with self._condition:
            self._granted += self._share or 0.0
            self._condition.notify_all()

    def release(self) -> None:
        """Hold nothing back any more: somebody waits for the result."""
        with self._condition:
            self._share = None
            self._condition.notify_all()

    def work(self, operations: float) -> None:
        """Count what was done, and rest until the steps have granted that much."""
        with self._condition:
            self.done += operations
            limit = time.monotonic() + _PATIENCE
            while not self._condition.wait_for(self._may_go_on, _LOOK):
                # No step will come any more: the process waits for this thread, or nobody trains.
                if not threading.main_thread().is_alive() or time.monotonic() > limit:
                    self._share = None

    def _may_go_on(self) -> bool:
        return self._share is None or self.done <= self._granted

    def __enter__(self) -> Pace:
        _local.pace = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _local.pace = None


def current_pace() -> Pace | None:
    """The pace set for this thread, to which `kfacore.parallel.cores.share` counts what it hands out."""
    pace: Pace | None = getattr(_local, "pace", None)
    return pace
