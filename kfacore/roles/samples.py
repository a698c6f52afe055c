r"""What a mini-batch showed of one block: the ground type between the network, which fills it, and moments.

Rows: a unit's input is a row wherever the unit is used: once a case, at every position, in every use of the module.
With N cases that have R rows each, X of (N R, d_in) and g of (k, N R, d_out) for k backward passes, and S the number
the objective is divided by (cases, or valid positions for a mean over positions),

    A = (1 / rows) X^T X,        G = (1 / S) sum over passes and rows of g g^T.

A pass is one more term of a sum, never one more case. Rows that do not count (padding, ignored positions) are zero in
X and g, and are not counted. A list of samples has one entry a block, None for a block that the mini-batch did not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.roles.block import Block

__all__ = ["LayerSamples", "Samples", "mean_diagonal", "rows_a_case", "traces"]

_CHUNK = 1 << 24
"""Numbers that a chunk of cases may take while rows of a case are compared with each other."""


@dataclass(frozen=True)
class LayerSamples:
    """Inputs and output gradients of one block.

    Attributes:
        inputs: abar, (N R, d_in) with the homogeneous 1 last if there is a bias; (N R, groups, d_in) with several
            groups; token numbers (N R,), integers that stand for one-hot rows, on the input side of an embedding: there
            a negative number is a row that does not count. Empty for a block that is no Kronecker product.
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
        return int(self.gradients.shape[1]) if self.count is None else self.count

    @property
    def cases(self) -> int:
        """Number of cases, N; of rows where they do not belong to cases in equal numbers."""
        return int(self.gradients.shape[1]) // (self.positions or 1)

    @property
    def divisor(self) -> float | Tensor:
        """S, the number that sums over rows of g g^T are divided by."""
        return self.cases if self.total is None else self.total


Samples = Sequence[LayerSamples | None]
"""What a mini-batch showed of every block, in their order."""


def mean_diagonal(samples: Samples, blocks: Sequence[Block] | None = None) -> Tensor:
    r"""Mean diagonal entry of the Fisher, tr F / P: what lambda is to be compared with.

    A case's gradient by a block is M = sum over its rows of g_r abar_r^T, so that with R rows a case

        S tr F = sum over cases of |M|_F^2 = sum over cases, r and r' of (g_r . g_r') (abar_r . abar_r'),

    which for one row a case is the sum of |abar|^2 |g|^2. Where rows do not belong to cases in equal numbers the
    Kronecker estimate tr A tr G stands for it. Of a weight used as embedding and as head the two uses are added without
    their cross term, as its curvature is.

    Args:
        samples: What an estimator saw; blocks that saw nothing are left out, parameters too.
        blocks: The blocks, whose sizes are asked for; needed where token numbers stand for rows.

    Returns:
        (), float64.

    Raises:
        ConfigError: There are token numbers and no blocks, or no block saw anything.
    """
    traces, parameters = [], 0
    for i, s in enumerate(samples):
        if s is None:
            continue
        traces.append(_trace(s))
        parameters += _parameters(s) if blocks is None else blocks[i].size
    if not traces:
        raise ConfigError("the mean diagonal of the Fisher was asked for, and no block saw anything in this mini-batch")
    return torch.stack(traces).sum() / parameters


def rows_a_case(samples: Samples, blocks: Sequence[Block]) -> float:
    """How many rows a case a parameter works on, in the mean over parameters: 1 for a net without positions.

    A step costs so many times what it would on one row a case. Token numbers are looked up, which costs next to
    nothing; of blocks whose rows are not told apart one a case is counted.
    """
    work, parameters = 0.0, 0
    for block, s in zip(blocks, samples, strict=True):
        if s is not None:
            s = s if s.head is None else s.head
            rows = s.positions or 1
            work += block.size * (rows if s.inputs.is_floating_point() else 0)
            parameters += block.size
    return work / parameters if parameters else 1.0


def traces(samples: Samples, blocks: Sequence[Block]) -> Tensor:  # (2, blocks) float64
    """S tr F of each block, and whether it saw anything: sums that several processes can add up.

    Where rows do not belong to cases in equal numbers, the Kronecker estimate is that of each process's own rows.
    """
    like = next((s.gradients for s in samples if s is not None), None)
    device = None if like is None else like.device
    found = torch.zeros(2, len(blocks), dtype=torch.float64, device=device)
    for i, s in enumerate(samples):
        if s is not None:
            head = None if s.head is None else replace(s.head, total=1.0)
            found[0, i] = _trace(replace(s, total=1.0, head=head))
            found[1, i] = 1.0
    return found


def _parameters(s: LayerSamples) -> int:
    """Number of parameters, as far as samples tell it."""
    if s.inputs.numel() == 0:
        return int(torch.Size(s.gradients.shape[2:]).numel())
    if s.inputs.dim() == 1:
        raise ConfigError("token numbers do not tell the size of their block: give mean_diagonal the blocks too")
    return int(s.inputs[0].numel() * s.gradients.shape[-1])


def _trace(s: LayerSamples) -> Tensor:
    """tr F of one block, (), float64."""
    head = 0.0 if s.head is None else _trace(s.head)
    if s.inputs.numel() == 0:  # gradients of cases, or rows whose squares add up to the diagonal
        return s.gradients.square().sum(dtype=torch.float64) / s.divisor + head
    if s.positions is not None and s.positions > 1:
        return _squares_of_sums(s, s.positions) / s.divisor + head
    token = s.inputs.dim() == 1
    abar = (s.inputs >= 0).to(s.gradients.dtype) if token else s.inputs.square().sum(-1)  # (N R, [groups])
    g = s.gradients.square().sum((0, -1))
    if s.positions is None:
        return (abar.sum(0, dtype=torch.float64) / s.rows * (g.sum(0, dtype=torch.float64) / s.divisor)).sum() + head
    if s.total is None and not token and abar.dim() == 1:
        return (abar * g).mean(dtype=torch.float64) + head
    return (abar * g).sum(dtype=torch.float64) / s.divisor + head


def _squares_of_sums(s: LayerSamples, R: int) -> Tensor:
    """Sum over cases and passes of |sum over rows of g abar^T|_F^2, in chunks of cases."""
    N, token = s.cases, s.inputs.dim() == 1
    x = s.inputs.reshape(N, R, *s.inputs.shape[1:])
    g = s.gradients.reshape(-1, N, R, *s.gradients.shape[2:])
    if g.dim() == 4:  # one group
        g, x = g.unsqueeze(3), x if token else x.unsqueeze(2)  # (k, N, R, groups, d_out), (N, R, groups, d_in)
    passes, groups = g.shape[0], g.shape[3]
    sums = not token and x.shape[-1] * g.shape[-1] < R * R
    size = groups * (passes * x.shape[-1] * g.shape[-1] if sums else (passes + 1) * R * R)
    chunk = max(1, _CHUNK // size)
    total = s.gradients.new_zeros((), dtype=torch.float64)
    for start in range(0, N, chunk):
        a, b = x[start : start + chunk], g[:, start : start + chunk]
        if sums:
            total += torch.einsum("nrgi,knrgo->kngio", a, b).square().sum(dtype=torch.float64)
            continue
        products = torch.einsum("knrgo,knsgo->ngrs", b, b)
        if token:
            same = (a.unsqueeze(2) == a.unsqueeze(1)) & (a >= 0).unsqueeze(2)
            total += (products * same.unsqueeze(1)).sum(dtype=torch.float64)
        else:
            total += (products * torch.einsum("nrgi,nsgi->ngrs", a, a)).sum(dtype=torch.float64)
    return total
