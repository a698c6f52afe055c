"""Interleaved timing in one process: contenders take turns, so that a drifting machine slows them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import mean, median

import torch

__all__ = ["Timing", "interleave"]


class Timing:
    """Seconds of each turn of one contender."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def mean(self) -> float:
        """Mean seconds a turn; over whole refresh cycles it includes the refreshes in their proportion."""
        return mean(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds a turn: what an ordinary step costs."""
        return median(self.seconds)

    @property
    def slowest(self) -> float:
        """The slowest turn."""
        return max(self.seconds)


def interleave(contenders: Mapping[str, Callable[[int], None]], turns: int, warmup: int) -> dict[str, Timing]:
    """Run every contender once a turn, in order, and time each call.

    Args:
        contenders: What to run, given the number of the turn.
        turns: Counted turns.
        warmup: Turns before them that are not counted.

    Returns:
        Timings by name.
    """
    timings = {name: Timing() for name in contenders}
    for turn in range(warmup + turns):
        for name, run in contenders.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                timings[name].seconds.append(time.perf_counter() - start)
    return timings
