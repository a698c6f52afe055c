"""From what an estimator sends back to what every block sees of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfacore.errors import DataError
from kfacore.network import Accumulated, Linearization
from kfacore.optim.drawing import Share
from kfacore.optim.joint import BoundJoint
from kfacore.optim.loss import BoundLoss, Total
from kfacore.parallel.ranks import Ranks
from kfacore.parallel.whole import Whole
from kfacore.roles.block import Block
from kfacore.roles.moment import divisor_of
from kfacore.roles.samples import Samples, traces

__all__ = ["mean_curvature", "seen", "shared", "traces_of"]


def seen(
    batch: Linearization | Accumulated,
    bound: BoundLoss | BoundJoint,
    vectors: Tensor,  # (k, n, ..., o)
    generator: torch.Generator,
    *,
    drawn: bool = False,
    part: Share | None = None,
) -> Iterator[tuple[float, Samples]]:
    """What each block sees of vectors of the loss (`BoundLoss.statistics`), with the S of their squares.

    A micro-batch at a time, each with its share of S, or all at once with the share 1.

    Args:
        batch: The mini-batch.
        bound: Its loss.
        vectors: One set a backward pass, of the estimator's cases.
        drawn: Whether they are independent draws of mean zero, whose products vanish without signs.
        generator: Source of the random signs that general networks need (`Linearization.signs`).
        part: Which cases these are of those that several processes share; S is then what they add to it.
    """
    z = batch.statistics_outputs()
    n = len(z)
    if n == 0:  # all are other processes'
        if part is not None and not (batch.plain or drawn):
            part.rows(z.shape[1:-1].numel())  # which processes ask of each other
        yield 1.0, [None for _ in batch.layers]
        return
    total = bound.total(n) if part is None else bound.weight(n)
    if batch.plain and bound.valid is None and not isinstance(total, Tensor) and total == n:
        yield from batch.seen(vectors)
        return
    if not (batch.plain or drawn):
        positions = z.shape[1:-1].numel()
        vectors = vectors * batch.signs(z, generator, None if part is None else part.rows(positions))
    valid = None if bound.valid is None else bound.valid[:n]
    yield from batch.seen(vectors, valid=valid, total=total)


def shared(
    bound: BoundLoss | BoundJoint, ranks: Ranks, whole: Whole, cases: Sequence[int], step: int
) -> list[BoundLoss | BoundJoint]:
    """The loss of one part, divided by the S of the whole mini-batch.

    Args:
        bound: The loss of the part.
        ranks: The processes.
        whole: The mini-batch that they share.
        cases: Numbers of first cases of the part; all of them first.
        step: Number of the step, for a refusal that comes later.

    Returns:
        For each of these numbers the loss whose S is that of the first cases of all processes.

    Raises:
        DataError: Nothing counts in the whole mini-batch.
    """
    if ranks.alone:
        return [bound for _ in cases]
    part = bound.part_of(whole.cases)
    each = [part.numbers(n) for n in cases]
    flat = [number for numbers in each for number in numbers]
    device = next((number.device for number in flat if isinstance(number, Tensor)), None)
    total: Sequence[Total]
    if device is None or device.type == "cpu":
        total = ranks.count("S", [float(number) for number in flat])
        if not total[0]:
            raise DataError(
                "targets: no position of the mini-batch counts on any process (all are masked or ignored), so its loss "
                "is 0 / 0; leave such mini-batches out"
            )
    else:  # only the device knows
        numbers = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in flat])
        total = list(ranks.sum("S", [numbers])[0].unbind())
        bound.loss.deferred.note(torch.as_tensor(total[0] == 0), step)
    size = len(each[0])
    return [part.with_numbers(total[i * size : (i + 1) * size]) for i in range(len(cases))]


def traces_of(samples: Samples, layers: Sequence[Block], device: torch.device) -> Tensor:  # (2 blocks + 1,) float64
    """What `mean_curvature` needs of a part of a mini-batch: sums, which may be added up over parts."""
    sums, S = traces(samples, layers).to(device), divisor_of(samples)
    return torch.cat([sums.flatten(), torch.as_tensor(S, dtype=torch.float64, device=device).view(1)])


def mean_curvature(
    sums: Tensor | None, ranks: Ranks, layers: Sequence[Block], device: torch.device
) -> Tensor:  # () float64
    """Mean diagonal entry of the Fisher of all that several processes have seen (`kfacore.roles.samples`).

    Args:
        sums: Of this process, see `traces_of`; None if it saw nothing.
        ranks: The processes.
        layers: The blocks.
        device: Where the parameters are.
    """
    if sums is None:
        sums = torch.zeros(2 * len(layers) + 1, dtype=torch.float64, device=device)
    (total,) = ranks.sum("curvature", [sums])
    sizes = torch.tensor([float(layer.size) for layer in layers], dtype=torch.float64, device=device)
    some: Tensor = total[len(layers) : -1] > 0
    mean: Tensor = total[: len(layers)].sum() / total[-1] / sizes[some].sum()
    return mean
