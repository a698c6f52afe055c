"""What the parts have in common: rows that are kept as they come, timing on the device, peaks of memory."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

__all__ = ["Part", "Peak", "Steps", "median_ms", "time_steps", "wait"]


@dataclass(frozen=True)
class Part:
    """What a part is given.

    Attributes:
        device: Where it computes.
        small: Whether it runs in seconds on a CPU, as a test of itself.
        until: When it should be done, on the clock of `time.monotonic`.
        file: Where its rows go, one JSON object a line, so that what is cut off loses nothing.
        mnist: Where the data of MNIST are, or None.
    """

    device: torch.device
    small: bool
    until: float
    file: Path
    mnist: Path | None = None

    def row(self, table: str, **values: Any) -> None:
        """Keep one row of a table; rows of a table have the same keys."""
        self._keep({"table": table, "row": values})

    def note(self, table: str, text: str) -> None:
        """Keep a remark on a table."""
        self._keep({"table": table, "note": text})

    def _keep(self, found: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.monotonic()

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def attempt(self, table: str, name: str, measure: Callable[[], None]) -> None:
        """One measurement: if it fails that is noted and the next goes on; without time left it is left out."""
        if self.left <= 0:
            self.note(table, f"{name}: left out, the time of this part was over")
            return
        try:
            measure()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.note(table, f"{name}: {text[:400]}")
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


class Peak:
    """Most bytes that torch allocates on the device from here on, beyond what there is now; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before = 0
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def megabytes(self) -> float | None:
        """Until now, in 10^6 bytes."""
        return (torch.cuda.max_memory_allocated() - self._before) / 1e6 if self._cuda else None


@dataclass(frozen=True)
class Steps:
    """Milliseconds of each counted step, over whole refresh cycles unless time ran out."""

    ms: list[float]

    @property
    def mean(self) -> float:
        """Of all steps, refreshes in their proportion."""
        return mean(self.ms)

    @property
    def median(self) -> float:
        """An ordinary step."""
        return median(self.ms)

    @property
    def slowest(self) -> float:
        """The slowest one."""
        return max(self.ms)


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_steps(
    step: Callable[[int], None], device: torch.device, *, warmup: int, cycle: int, cycles: int, seconds: float
) -> Steps:
    """Time steps one after another, as a training loop runs them: the host is as far ahead as it gets.

    On a GPU the time from the end of a step to the end of the next is taken on the device, by events.

    Args:
        step: Given the number of the turn, from 0.
        device: Where it computes.
        warmup: Steps that are not counted; they also pass the refreshes of the first steps.
        cycle: Steps from one refresh to the next; whole cycles are counted.
        cycles: Most cycles.
        seconds: After these it ends, also within a cycle.

    Raises:
        TimeoutError: The warm-up took all of them.
    """
    clock = _Clock(device)
    end = time.monotonic() + seconds
    for turn in range(warmup):
        step(turn)
        if time.monotonic() > end:
            raise TimeoutError(f"{turn + 1} steps of warm-up took the {seconds:.0f} seconds that there were")
    clock.start()
    for number in range(cycles):
        for turn in range(warmup + number * cycle, warmup + (number + 1) * cycle):
            step(turn)
            clock.tick()
            if time.monotonic() > end:  # the host may be ahead of the device, but not further than its queue is long
                return Steps(clock.ms())
    return Steps(clock.ms())


class _Clock:
    """Marks between steps: events on a GPU, which nobody waits for until the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def start(self) -> None:
        """The first mark."""
        wait(self._device)
        self.tick()

    def tick(self) -> None:
        """One more mark."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        """From each mark to the next."""
        wait(self._device)
        pairs = pairwise(self._marks)
        return [a.elapsed_time(b) if self._device.type == "cuda" else 1e3 * (b - a) for a, b in pairs]


def median_ms(job: Callable[[], object], device: torch.device, *, times: int, warmup: int = 2) -> float:
    """Milliseconds of a job, waited for each time: what a refresh costs a step that needs its result."""
    found = []
    for turn in range(warmup + times):
        wait(device)
        start = time.perf_counter()
        job()
        wait(device)
        if turn >= warmup:
            found.append(1e3 * (time.perf_counter() - start))
    return median(found)
