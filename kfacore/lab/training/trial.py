"""How much memory a run's steps take, measured on a few examples (``kfac train --dry-run``).

The memory of a step is a constant (averages, inverses, vectors) and something for every example (outputs, their
derivatives, what a backward pass keeps). Two steps are taken on a few examples, and again on twice as many: the first
step, which studies the model, and the one that compares the most candidates of gamma. Every allocation grows with the
examples, or does not, so the curve of memory over the two steps is known at any number of examples, and with it its
highest point. Where the two curves cannot be laid on each other, their highest points alone tell it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kfacore.nest import slice_cases
from kfacore.optim.kfac import KFAC
from kfacore.registry import get_registry

__all__ = ["StepMemory", "step_memory"]

_PROFILER = (b"SyncActivityProfilerHandler.cpp", b"CPUAllocator.cpp")
"""In lines that are about the profiler's own beginning and end, and about what was allocated before it."""

_MOST = 8
"""Examples of the smaller of the two trials, at most."""

_LOOK_AHEAD = 200
"""Steps among which the one with most candidates is looked for."""


@dataclass(frozen=True)
class StepMemory:
    """What a step takes beside the parameters, the data and the program.

    Attributes:
        examples: Examples of the mini-batch.
        peak: Bytes at the highest point.
        measured: Examples that it was measured on.
    """

    examples: int
    peak: int
    measured: int


def step_memory(
    build: Callable[[], KFAC], inputs: Any, targets: Tensor, examples: int, share: float = 1.0
) -> StepMemory:
    """Bytes that steps on mini-batches of so many examples take at most, beside parameters and data.

    Args:
        build: Makes the optimizer with a model of its own, whose parameters move.
        inputs: Some real examples.
        targets: Their targets.
        examples: Examples of a mini-batch of the run.
        share: The smallest share of a mini-batch that is treated apart (tau_1, tau_2); the trials have enough examples
            to show it, where there are so many.

    Raises:
        KfacError: What the run's first step would refuse.
    """
    with _few_to_collect():
        return _measured(build, inputs, targets, examples, share)


def _measured(build: Callable[[], KFAC], inputs: Any, targets: Tensor, examples: int, share: float) -> StepMemory:
    """From one curve or two."""
    there = len(targets)
    few = min(_MOST, max(2, round(1.0 / share)))
    if examples <= min(2 * few, there):
        return StepMemory(examples, max(_curve(build, inputs, targets, examples)), examples)
    few = max(1, min(few, there // 2))
    many = min(2 * few, there)
    small = _curve(build, inputs, targets, few)
    if many == few:
        return StepMemory(examples, max(small) * examples // few, few)
    large = _curve(build, inputs, targets, many)
    if len(small) != len(large):  # the first trial of a process may load what the others then have
        small = _curve(build, inputs, targets, few)
    if len(small) != len(large):
        small, large = [max(small)], [max(large)]
    steps = (examples - many) / (many - few)
    return StepMemory(examples, round(max(b + (b - a) * steps for a, b in zip(small, large, strict=True))), many)


@contextmanager
def _few_to_collect() -> Iterator[None]:
    """Each curve begins with a collection of garbage, which need not look at all that was there before."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _curve(build: Callable[[], KFAC], inputs: Any, targets: Tensor, examples: int) -> list[int]:
    """Bytes in use after every allocation of the first step and of the busiest one."""
    optimizer = build()
    # Whether a step is undone depends on the data, and would make two curves differ; what undoing takes is one copy.
    kept = sum(p.numel() * p.element_size() for p in optimizer.linearizer.parameters) * optimizer.trust.looks_back
    optimizer.trust = get_registry().build("trust", "none")
    device = optimizer.linearizer.parameters[0].device
    x, y = slice_cases(inputs, 0, examples), targets[:examples]

    def steps() -> None:
        optimizer.step(x, y)
        optimizer.steps = _busiest(optimizer) - 1
        optimizer.step(x, y)

    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        return [torch.cuda.max_memory_allocated(device) - before + kept]
    with _unspoken(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    found = profiler.profiler
    assert found is not None
    assert found.kineto_results is not None
    sizes = [event.nbytes() for event in found.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(sizes, initial=kept))


@contextmanager
def _unspoken() -> Iterator[None]:
    """What torch's profiler itself writes to standard error, past Python, is left out; all else comes afterwards."""
    with contextlib.ExitStack() as opened:
        try:
            held = opened.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:  # no standard error, or nowhere to keep it
            yield
            return
        _flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            others = b"".join(line for line in held if not any(mark in line for mark in _PROFILER))
            with contextlib.suppress(OSError), open(2, "wb", closefd=False) as out:
                out.write(others)


def _flush() -> None:
    """What Python holds back for standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _busiest(optimizer: KFAC) -> int:
    """A step after the first with as many candidates of gamma as there ever are, one that adapts lambda if any does."""
    damping = optimizer.damping
    return max(range(2, _LOOK_AHEAD), key=lambda step: (len(damping.candidates(step)), damping.adapts(step), -step))
