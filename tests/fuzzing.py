"""What every fuzz test is held to: the library's own errors, in time, within memory; shared by the tests in ``fuzz``.

`examples` runs a test on 60 drawn examples, or on 1,000 with ``pytest --all`` (``make test-all``). The draws are the
same in every run: a failure can be had again, and is told with the smallest example that shows it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings

from kfacore.errors import KfacError

__all__ = ["FEW", "MANY", "bounded", "examples", "refused_or"]

FEW, MANY = 60, 1000
MEMORY = 4 * 10**9
"""Bytes that an example may take beside what the process has."""
SECONDS = 60.0
"""Processor seconds of an example; a busy machine makes none of them."""
WALL = 600
"""Seconds of an example that waits and computes nothing."""

ALL = "KFAC_TEST_ALL"
"""Environment variable that ``pytest --all`` sets, for the processes that pytest-xdist starts too."""


class Hang(BaseException):
    """An example ran for longer than `SECONDS`; not an `Exception`, so that nobody catches it on its way."""


def examples(*strategies: Any, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`hypothesis.given` with the number of examples of this run, each of them `bounded`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def held(*args: Any, **kwargs: Any) -> None:
            with bounded():
                test(*args, **kwargs)

        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        options: dict[str, Any] = {
            "max_examples": MANY if os.environ.get(ALL) else FEW,
            "derandomize": True,
            "database": None,
            "deadline": None,
            "print_blob": False,
            "suppress_health_check": checks,
        }
        return settings(**options)(given(*strategies, **named)(held))

    return decorate


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Memory beyond `MEMORY` is refused by the system, and `Hang` is raised after too long a time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still not done after {SECONDS:g} processor seconds or {WALL} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handlers = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGVTALRM)]
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.alarm(WALL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in handlers:
            signal.signal(number, handler)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def refused_or(action: Callable[[], Any]) -> tuple[Any, KfacError | None]:
    """What an action returns, or the library's own error, whose message says something and not too much.

    Every other exception goes through to the test.
    """
    try:
        return action(), None
    except KfacError as error:
        refusal = error
    message = str(refusal)
    assert 10 < len(message) < 4000, message
    assert "Traceback" not in message
    return None, refusal
