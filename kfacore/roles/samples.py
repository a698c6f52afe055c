r"""What a mini-batch showed of one block: the ground type between the network, which fills it, and moments.

Rows: a unit's input is a row wherever the unit is used: once a case, at every position, in every use of the module.
With N cases that have R rows each, X of (N R, d_in) and g of (k, N R, d_out) for k backward passes, and S the number
the objective is divided by (cases, or valid positions for a mean over positions),

    A = (1 / rows) X^T X,        G = (1 / S) sum over passes and rows of g g^T.

A pass is one more term of a sum, never one more case. Rows that do not count (padding, ignored positions) are zero in
X and g, and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerSamples", "mean_diagonal"]


@dataclass(frozen=True)
class LayerSamples:
    """Inputs and output gradients of one block.

    Attributes:
        inputs: abar, (N R, d_in) with the homogeneous 1 last if there is a bias; (N R, groups, d_in) with several
            groups; token numbers (N R,), integers that stand for one-hot rows, on the input side of an embedding.
            Empty for a block that is no Kronecker product.
        gradients: g of each backward pass, (k, N R, d_out) or (k, N R, groups, d_out). For a ``full`` block the
            gradient of every case by its parameters, (k, N, [groups,] d_in). For a ``diagonal`` one rows whose squares
            sum to an unbiased estimate of S times the Fisher's diagonal, (k, rows, size).
        positions: R, rows a case; None where rows do not belong to cases in equal numbers.
        count: Rows that count; all of them if left out.
        total: S; the number of cases if left out. It and ``count`` may be scalars on the device.
        head: For a ``tied`` block, whose other fields are those of its use as embedding: those of its use as head.
    """

    inputs: Tensor
    gradients: Tensor
    positions: int | None = 1
    count: int | Tensor | None = None
    total: float | Tensor | None = None
    head: LayerSamples | None = None

    @property
    def rows(self) -> int | Tensor:
        """Number of rows that A is the mean of."""
        return int(self.inputs.shape[0]) if self.count is None else self.count

    @property
    def cases(self) -> int:
        """Number of cases, N; of rows where they do not belong to cases in equal numbers."""
        return int(self.gradients.shape[1]) // (self.positions or 1)

    @property
    def divisor(self) -> float | Tensor:
        """S, the number that sums over rows of g g^T are divided by."""
        return self.cases if self.total is None else self.total


def mean_diagonal(samples: Sequence[LayerSamples]) -> Tensor:
    r"""Mean diagonal entry of the Fisher, tr F / P: what lambda is to be compared with.

    With one row a case tr F is the mean over cases of sum_i |abar_i|^2 |g_i|^2, because a case's gradient by block i is
    g_i abar_i^T.

    Args:
        samples: What an estimator saw, one a layer.

    Returns:
        (), float64.
    """
    traces, parameters = [], 0
    for s in samples:
        per_case = s.inputs.square().sum(1) * s.gradients.square().sum((0, 2))
        traces.append(per_case.mean(dtype=torch.float64))
        parameters += s.inputs.shape[1] * s.gradients.shape[2]
    return torch.stack(traces).sum() / parameters
