"""Kernels and waits of each kind of step: seen by the profiler and by CUDA's own watch for synchronisations.

On a CPU the operations that would be launched are counted instead, and those that would wait (`benchmarks.launches`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.contenders import Contender, first_order, guest, own_loop
from benchmarks.gpu.nets import Task, autoencoder, gpt
from benchmarks.gpu.part import Part, wait
from benchmarks.launches import Launches
from kfacore.parallel.cores import torch_threads

__all__ = ["measure"]

_TABLE = "launches"
_FIRST = {"ordinary": 4}
_OWN = {"ordinary": 18, "adapts lambda": 15, "refreshes": 20}  # the first ones may be undone, and refresh again
_GUEST = {"ordinary": 4, "refreshes": 10}


@dataclass(frozen=True)
class _Seen:
    """One step.

    Attributes:
        kernels: Kernels launched; operations on a CPU.
        copies: Copies and fills.
        busy: Milliseconds of kernels, None on a CPU.
        waits: File and line of the Python that waited for the device, with how often.
    """

    kernels: int
    copies: int | None
    busy: float | None
    waits: Counter[str]


@contextmanager
def _waits(found: Counter[str]) -> Iterator[None]:
    """Count where the host waits, as CUDA's debug mode tells it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught or ():
        if "synchroniz" in str(warning.message):
            found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def _look(step: Callable[[int], None], turn: int, device: torch.device) -> _Seen:
    """Run one step and see what it does."""
    places: Counter[str] = Counter()
    if device.type == "cpu":  # a dispatch mode sees its own thread only, and a refresh would use others
        with torch_threads(1), Launches() as seen:
            step(turn)
        return _Seen(sum(seen.operations.values()), None, None, Counter({"host": seen.waits}))
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with _waits(places):
            step(turn)
        wait(device)
    found = (event for event in profiled.events() or () if event.device_type == DeviceType.CUDA)
    events = [event for event in found if not event.is_user_annotation]  # those are spans, such as that of a step
    moved = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e3
    return _Seen(len(events) - len(moved), len(moved), busy, places)


def _count(part: Part, task: Task, contender: Contender, kinds: Mapping[str, int]) -> None:
    """Rows of one contender: the first step of each kind."""
    step = contender.start(task)
    names = {number: kind for kind, number in kinds.items()}
    for number in range(1, max(names) + 1):
        if number not in names:
            step(number - 1)
            continue
        seen = _look(step, number - 1, task.device)
        part.row(
            _TABLE,
            net=task.name,
            step=f"{contender.name}, {names[number]}",
            kernels=seen.kernels,
            copies=seen.copies,
            **{"kernels ms": seen.busy, "waits": sum(seen.waits.values())},
            where=", ".join(f"{place} {count}" for place, count in seen.waits.most_common(4) if count),
        )


def measure(part: Part) -> None:
    """The MNIST net, then the GPT."""
    blockdiag = {"kind": "blockdiag"}
    small = [
        (first_order("SGD, fused"), _FIRST),
        (first_order("AdamW, fused"), _FIRST),
        (own_loop("K-FAC blockdiag", blockdiag), _OWN),
        (own_loop("K-FAC tridiag", {"kind": "tridiag"}), _OWN),
        (guest("AdamW, fused", "K-FAC around AdamW"), _GUEST),
    ]
    large = [
        (first_order("AdamW, fused"), _FIRST),
        (guest("AdamW, fused", "K-FAC around AdamW, power 1", approx={**blockdiag, "power": 1.0}), _GUEST),
    ]
    tasks = autoencoder(part.device, 64 if part.small else 1000, small=part.small), gpt(part.device, small=part.small)
    for task, contenders in zip(tasks, (small, large), strict=True):
        for contender, kinds in contenders:
            part.attempt(_TABLE, f"{task.name}, {contender.name}", partial(_count, part, task, contender, kinds))
