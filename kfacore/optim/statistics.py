"""From what an estimator sends back to what every block sees of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfacore.network import Accumulated, Linearization
from kfacore.optim.joint import BoundJoint
from kfacore.optim.loss import BoundLoss
from kfacore.roles.samples import Samples

__all__ = ["seen"]


def seen(
    batch: Linearization | Accumulated,
    bound: BoundLoss | BoundJoint,
    vectors: Tensor,  # (k, n, ..., o)
    generator: torch.Generator,
    *,
    drawn: bool = False,
) -> Iterator[tuple[float, Samples]]:
    """What each block sees of vectors of the loss (`BoundLoss.statistics`), with the S of their squares.

    A micro-batch at a time, each with its share of S, or all at once with the share 1.

    Args:
        batch: The mini-batch.
        bound: Its loss.
        vectors: One set a backward pass, of the estimator's cases.
        drawn: Whether they are independent draws of mean zero, whose products vanish without signs.
        generator: Source of the random signs that general networks need (`Linearization.signs`).
    """
    z = batch.statistics_outputs()
    n, total = len(z), bound.total(len(z))
    if batch.plain and bound.valid is None and not isinstance(total, Tensor) and total == n:
        yield from batch.seen(vectors)
        return
    if not (batch.plain or drawn):
        vectors = vectors * batch.signs(z, generator)
    valid = None if bound.valid is None else bound.valid[:n]
    yield from batch.seen(vectors, valid=valid, total=total)
