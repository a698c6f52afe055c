"""One loss of a mini-batch that several processes share, divided by what counts in all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacore.errors import DataError
from kfacore.optim.bound_loss import BoundLoss, Total
from kfacore.optim.joint import BoundJoint
from kfacore.parallel.ranks import Ranks
from kfacore.parallel.whole import Whole

__all__ = ["shared"]


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
