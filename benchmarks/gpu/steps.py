"""Step times and peaks of memory against fused optimizers of torch, on three nets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.gpu.contenders import CYCLE, Contender, first_order, guest, own_loop
from benchmarks.gpu.nets import Task, autoencoder, gpt, residual
from benchmarks.gpu.part import Part, Peak, time_steps

__all__ = ["on_gpt", "on_mnist", "on_residual"]

_FIRST = [first_order(name) for name in ("SGD, fused", "AdamW, fused", "Muon")]
_BLOCKDIAG = {"kind": "blockdiag"}

_LARGE = 4
"""Steps before the counted ones on large nets, whose refreshes are dear: those of the first three."""


def _compare(part: Part, task: Task, contenders: Sequence[Contender], warmup: int, until: float = 0.0) -> None:
    """One table: milliseconds a step, as shares of SGD's and AdamW's, and the peak of memory.

    Args:
        part: The part.
        task: Net and batch.
        contenders: Who is compared; SGD and AdamW come first.
        warmup: Steps that are not counted.
        until: Seconds of the part that are to be left over.
    """
    table = f"step: {task.name}, {part.device.type}"
    means: dict[str, float] = {}
    medians: dict[str, float] = {}

    def measure(contender: Contender, share: float) -> None:
        peak = Peak(part.device)
        step = contender.start(task)
        cycle = 2 if part.small else contender.cycle
        cycles = 1 if part.small else 80 // cycle
        steps = time_steps(step, part.device, warmup=warmup, cycle=cycle, cycles=cycles, seconds=share)
        means[contender.name], medians[contender.name] = steps.mean, steps.median
        sgd, adamw = "SGD, fused", "AdamW, fused"
        part.row(
            table,
            optimizer=contender.name,
            **{
                "mean ms": steps.mean,
                "median ms": steps.median,
                "slowest ms": steps.slowest,
                "mean / SGD": steps.mean / means[sgd] if sgd in means else None,
                "median / SGD": steps.median / medians[sgd] if sgd in medians else None,
                "median / AdamW": steps.median / medians[adamw] if adamw in medians else None,
                "slowest / median": steps.slowest / steps.median,
                "peak MB": peak.megabytes(),
                "steps": len(steps.ms),
            },
        )

    for done, contender in enumerate(contenders):
        share = (part.left - until) / (len(contenders) - done)
        part.attempt(table, contender.name, partial(measure, contender, share))


def on_mnist(part: Part) -> None:
    """The MNIST net at batches of 1,000 and 10,000."""
    contenders = [
        *_FIRST,
        guest("AdamW, fused", "K-FAC around AdamW"),
        own_loop("K-FAC blockdiag", _BLOCKDIAG),
        own_loop("K-FAC blockdiag, power 1", {**_BLOCKDIAG, "power": 1.0}),
        own_loop("K-FAC blockdiag, background", _BLOCKDIAG, "background"),
        own_loop("K-FAC tridiag", {"kind": "tridiag"}),
    ]
    if part.small:
        _compare(part, autoencoder(part.device, 64, small=True), contenders[:5], 1)
        return
    _compare(part, autoencoder(part.device, 1000, small=False), contenders, CYCLE, until=part.left / 2)
    _compare(part, autoencoder(part.device, 10000, small=False), contenders, CYCLE)


def on_gpt(part: Part) -> None:
    """The GPT, forward and backward passes in bfloat16."""
    background = {"approx": {**_BLOCKDIAG, "refresh": "background"}}
    contenders = [
        *_FIRST,
        guest("AdamW, fused", "K-FAC around AdamW, power 1", approx={**_BLOCKDIAG, "power": 1.0}),
        guest("AdamW, fused", "K-FAC around AdamW"),
        guest("AdamW, fused", "K-FAC around AdamW, background", **background),
        own_loop("K-FAC blockdiag, background", _BLOCKDIAG, "background"),
    ]
    _compare(part, gpt(part.device, small=part.small), contenders, 1 if part.small else _LARGE)


def on_residual(part: Part) -> None:
    """The residual net, forward and backward passes in bfloat16."""
    background = {"approx": {**_BLOCKDIAG, "refresh": "background"}}
    contenders = [
        *_FIRST,
        guest("SGD, fused", "K-FAC around SGD"),
        guest("SGD, fused", "K-FAC around SGD, background", **background),
    ]
    _compare(part, residual(part.device, small=part.small), contenders, 1 if part.small else _LARGE)
