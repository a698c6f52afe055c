r"""A refresh in the background: factor work on a thread of its own while steps go on with the old inverse.

The paper leaves open that the inverse could be computed "in parallel with the other tasks, or perhaps even while the
network is being optimized" (Martens & Grosse 2015, section 8). Here the moments are copied at step k, and what comes
of them is taken up at step k + D whatever the machine was doing, so that results never depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import NumericalError
from kfacore.nest import tensors_of
from kfacore.roles.approx import Inverse, Notice

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
    """One refresh at a time on a worker thread.

    On a CPU the worker has half the process's torch threads, at least one. On a GPU it works on a stream of its own.

    Args:
        device: Where the factors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._worker: ThreadPoolExecutor | None = None
        self._result: Future[Made] | Made | None = None
        self.due: int | None = None

    def start(self, job: Callable[[], Made], due: int) -> None:
        """Begin; what the job reads must not change any more.

        Args:
            job: Makes the inverses.
            due: The step that takes them up.
        """
        if self._worker is None:
            threads = max(1, torch.get_num_threads() // 2)
            self._worker = ThreadPoolExecutor(1, "kfac-refresh", torch.set_num_threads, (threads,))
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._result, self.due = self._worker.submit(self._run, job, ready), due

    def _run(self, job: Callable[[], Made], ready: torch.cuda.Event | None) -> Made:
        if ready is None:
            return job()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types here
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            made = job()
        stream.synchronize()  # blocks this thread only
        return made

    def collect(self, load: Callable[[Any], Inverse]) -> Made:
        """Wait for the refresh under way and hand it over.

        Args:
            load: Restores an inverse from its state. What an inverse derives from its state is derived again by the
                caller: it then belongs to the caller's stream, and has the same bits as after a checkpoint, which a
                product on another number of threads may not have.
        """
        state = self._wait().state_dict()
        self._result = self.due = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors_of(state):
                tensor.record_stream(stream)
        return Made.from_state(state, load)

    def _wait(self) -> Made:
        if self._result is None:
            raise NumericalError("there is no refresh under way in the background")
        return self._result if isinstance(self._result, Made) else self._result.result()

    def state_dict(self) -> dict[str, Any] | None:
        """The refresh under way, finished for the purpose, and when it is due; None if there is none."""
        return None if self.due is None else {"due": self.due, "made": self._wait().state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None, load: Callable[[Any], Inverse]) -> None:
        """Take up a refresh that was under way."""
        self._result, self.due = None, None
        if state is not None:
            self._result, self.due = Made.from_state(state["made"], load), state["due"]
