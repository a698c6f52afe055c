r"""A refresh in the background: factor work on a thread of its own while steps go on with the old inverse.

The paper leaves open that the inverse could be computed "in parallel with the other tasks, or perhaps even while the
network is being optimized" (Martens & Grosse 2015, section 8). Here the moments are copied at step k, and what comes
of them is taken up at step k + D whatever the machine was doing, so that results never depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import NumericalError
from kfacore.nest import tensors_of
from kfacore.parallel.pace import Pace
from kfacore.roles.inverse import Inverse, Notice

__all__ = ["BackgroundRefresh", "Made"]


@dataclass(frozen=True)
class Made:
    """What a refresh came to.

    Attributes:
        pairs: Each gamma that could be factorised, with its inverse.
        notices: What must be reported.
        failure: What went wrong with the gammas that are missing, or None.
    """

    pairs: Sequence[tuple[Tensor, Inverse]]
    notices: Sequence[Notice] = ()
    failure: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, strings and containers."""
        return {
            "gammas": [gamma for gamma, _ in self.pairs],
            "inverses": [inverse.state_dict() for _, inverse in self.pairs],
            "notices": [[notice.layer, notice.message] for notice in self.notices],
            "failure": self.failure,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], load: Callable[[Any], Inverse]) -> Made:
        """Restore from `state_dict`; ``load`` restores an inverse from its own state."""
        inverses = [load(saved) for saved in state["inverses"]]
        notices = [Notice(layer, message) for layer, message in state["notices"]]
        return cls(list(zip(state["gammas"], inverses, strict=True)), notices, state["failure"])


class BackgroundRefresh:
    """One refresh at a time, each on a thread of its own.

    On a CPU the thread has half the process's torch threads, at least one, and spreads its work evenly over the steps
    that it has. On a GPU it works on a stream of its own.

    Args:
        device: Where the factors are.

    Attributes:
        due: The step that takes up the refresh under way, or None.
        operations: What the last refresh cost, from which the next one's pace is set.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._result: Future[Made] | Made | None = None
        self.due: int | None = None
        self.operations: float | None = None
        self._pace = Pace()
        self._stream: torch.cuda.Stream | None = None

    def start(self, job: Callable[[], Made], due: int, steps: int) -> None:
        """Begin; what the job reads must not change any more.

        Args:
            job: Makes the inverses.
            due: The step that takes them up.
            steps: Steps until then.
        """
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        # Done one step early, so that nobody waits; unhindered as long as nothing is known of the cost.
        self._pace = Pace(max(1, steps - 1), self.operations)
        self._result, self.due = Future(), due
        # Not from a pool: the interpreter waits for a pool's threads before anything tells them that it is ending.
        threads = torch.get_num_threads()
        Thread(target=self._run, args=(job, ready, self._pace, self._result, threads), name="kfac-refresh").start()

    def advance(self) -> None:
        """One more step has come: the worker may go on."""
        self._pace.grant()

    def _run(
        self,
        job: Callable[[], Made],
        ready: torch.cuda.Event | None,
        pace: Pace,
        result: Future[Made],
        threads: int,
    ) -> None:
        # Of this thread, and of threads that begin to use torch while it works: torch keeps one default for those.
        torch.set_num_threads(max(1, threads // 2))
        try:
            with pace:
                made = self._work(job, ready)
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(made)
        finally:
            torch.set_num_threads(threads)

    def _work(self, job: Callable[[], Made], ready: torch.cuda.Event | None) -> Made:
        if ready is None:
            return job()
        if self._stream is None:  # one for all refreshes: memory that a stream has freed is not given to another one
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types here
        stream = self._stream
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            made = job()
        stream.synchronize()  # blocks this thread only
        return made

    def collect(self, load: Callable[[Any], Inverse]) -> Made:
        """Wait for the refresh under way and hand it over, or raise what ended it; there is none afterwards.

        Args:
            load: Restores an inverse from its state. What an inverse derives from its state is derived again by the
                caller: it then belongs to the caller's stream, and has the same bits as after a checkpoint, which a
                product on another number of threads may not have.
        """
        try:
            state = self._wait().state_dict()
        finally:
            self._result = self.due = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors_of(state):
                tensor.record_stream(stream)
        return Made.from_state(state, load)

    def _wait(self) -> Made:
        if self._result is None:
            raise NumericalError("there is no refresh under way in the background")
        if isinstance(self._result, Made):
            return self._result
        self._pace.release()
        made = self._result.result()
        self.operations = self._pace.done
        return made

    def state_dict(self) -> dict[str, Any] | None:
        """The refresh under way, finished for the purpose, and when it is due; None if there is none or it failed."""
        if self.due is None:
            return None
        try:
            made = self._wait()
        except Exception:  # `collect` tells it; what has been reached must still be saved
            return None
        return {"due": self.due, "made": made.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None, load: Callable[[Any], Inverse]) -> None:
        """Take up a refresh that was under way, in place of an own one."""
        self._pace.release()
        self._result, self.due = None, None
        if state is not None:
            self._result, self.due = Made.from_state(state["made"], load), state["due"]
