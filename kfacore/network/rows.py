r"""What one forward pass and its backward passes showed of every block, as `LayerSamples`.

The uses of a block are further rows of the same cases. Rows of a layer that has as many positions as z follow the mask
of valid positions; a row that does not count is zero (a token number -1). With *reduce* the rows of a case are one:

    m_n = mean over rows of abar,        g_n = sum over rows of g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Call
from kfacore.roles.samples import LayerSamples

__all__ = ["Counting", "all_equal", "as_vector", "explained", "rows_of", "samples_of"]


@dataclass(frozen=True)
class Counting:
    """Which cases and positions count.

    Attributes:
        cases: Cases of the forward pass.
        kept: The estimator's, the first of them; rows of the others are left out where they have nothing to say.
        valid: Positions of z that count, (cases, T), or None for all.
        total: S.
    """

    cases: int
    kept: int
    valid: Tensor | None
    total: float | Tensor


Passes = Sequence[Sequence[Tensor | None]]
"""Output gradients: for each backward pass one tensor a call."""


def samples_of(block: ModelBlock, calls: list[Call], passes: Passes, counting: Counting, reduce: bool) -> LayerSamples:
    """The samples of one block that was used.

    Args:
        block: A block that is not `diagonal`.
        calls: Its calls.
        passes: The gradients by the calls' outputs.
        counting: What counts.
        reduce: Whether the rows of a case are one.
    """
    if block.info.kind == "full":
        return _full(calls, passes, counting)
    if block.info.kind == "tied":
        first = len(block.users) - block.heads
        users = block.users[:first]
        own = [i for i, call in enumerate(calls) if any(call.user is user for user in users)]
        others = [i for i in range(len(calls)) if i not in own]
        parts = [
            _kron([calls[i] for i in which], [[one[i] for i in which] for one in passes], counting, False)
            if which
            else None
            for which in (own, others)
        ]
        return _tied(block, parts, calls, len(passes), counting)
    return _kron(calls, passes, counting, reduce)


def _tied(
    block: ModelBlock, parts: Sequence[LayerSamples | None], calls: list[Call], k: int, counting: Counting
) -> LayerSamples:
    """The embedding's with the head's inside; a use that did not happen has no rows."""
    like, (vocabulary, width) = calls[0].s, (block.info.d_out, block.info.d_in)
    dtype = calls[0].dtype
    nothing = like.new_empty(k, 0, width, dtype=dtype), like.new_empty(k, 0, vocabulary, dtype=dtype)
    tokens = torch.empty(0, dtype=torch.long, device=like.device)
    body = parts[0] or LayerSamples(tokens, nothing[0], None, 0, counting.total)
    head = parts[1] or LayerSamples(like.new_empty(0, width, dtype=dtype), nothing[1], None, 0, counting.total)
    return LayerSamples(body.inputs, body.gradients, body.positions, body.count, body.total, head)


def _gradient(call: Call, g: Tensor | None) -> Tensor:
    """What arrived at the call, in the parameters' dtype, cases first; zero where nothing depends on it."""
    return call.cases_first(torch.zeros_like(call.s, dtype=call.dtype) if g is None else g.to(call.dtype))


def _full(calls: list[Call], passes: Passes, counting: Counting) -> LayerSamples:
    """The gradient of every case by the parameters, summed over uses, (k, n, [groups,] d_in)."""
    found = []
    for one in passes:
        parts = [
            call.user.type.gradients(call.user.block, call.user.module, call.typed, _gradient(call, g))
            for call, g in zip(calls, one, strict=True)
            if call.user.type is not None
        ]
        found.append(sum(parts[1:], parts[0]))
    gradients = torch.stack(found)
    if all(_cases(call, counting) for call in calls):
        gradients = gradients[:, : counting.kept]
    return LayerSamples(gradients.new_empty(0), gradients, 1, None, counting.total)


def _kron(calls: list[Call], passes: Passes, counting: Counting, reduce: bool) -> LayerSamples:
    inputs: list[Tensor] = []
    gradients: list[list[Tensor]] = [[] for _ in passes]
    masks: list[Tensor | None] = []
    for index, call in enumerate(calls):
        cases = _cases(call, counting)
        x = rows_of(call, counting.kept if cases else None)  # (n, R, ...)
        masks.append(_counts(call, x, counting if cases else None))
        inputs.append(_masked(x, masks[-1]))
        for found, one in zip(gradients, passes, strict=True):
            found.append(_masked(_outputs(call, _gradient(call, one[index]))[: len(x)], masks[-1]))
    together = len({x.shape[0] for x in inputs}) == 1
    belongs = together and all(_cases(call, counting) for call in calls)
    x, positions = _flat(inputs, together)
    flat = [_flat(parts, together)[0] for parts in gradients]
    g = torch.stack(flat) if len(flat) > 1 else flat[0].unsqueeze(0)
    count = _count(inputs, masks)
    for call in calls:
        call.release()
    if reduce and belongs and positions is not None and all(mask is None for mask in masks):
        shape = (counting.kept, positions)
        x, g = torch.unflatten(x, 0, shape), torch.unflatten(g, 1, shape).sum(2)
        x = x.mean(1) if x.is_floating_point() else _shares(x, calls[0].user.block.d_in, g)
        return LayerSamples(x, g, 1, None, counting.total)
    return LayerSamples(x, g, positions if belongs else None, count, counting.total)


def _shares(
    tokens: Tensor,  # (n, R)
    size: int,
    like: Tensor,
) -> Tensor:  # (n, size)
    """The mean over a case's rows of what token numbers stand for."""
    share = like.new_full(tokens.shape, 1.0 / tokens.shape[1])
    return like.new_zeros(len(tokens), size).scatter_add_(1, tokens, share)


def _cases(call: Call, counting: Counting) -> bool:
    """Whether the call's rows belong to the cases of the forward pass."""
    return call.axis is not None and call.typed.inputs.dim() > 0 and len(call.typed.inputs) == counting.cases


def rows_of(call: Call, cases: int | None = None) -> Tensor:  # (n, R, ...)
    """The rows of one call, as its layer type reads them; of the first cases alone, the others are never formed."""
    if call.user.type is None:
        return call.rows[:cases].unsqueeze(1)
    use = call.typed if cases is None else call.typed.first(cases)
    return call.user.type.rows(call.user.block, call.user.module, use)


def _outputs(call: Call, g: Tensor) -> Tensor:
    if call.user.type is None:
        return g.unsqueeze(1)
    return call.user.type.gradients(call.user.block, call.user.module, call.typed, g)


def _counts(call: Call, x: Tensor, counting: Counting | None) -> Tensor | None:
    """Which of the rows x count, (n, R), or None for all; without a counting the rows do not belong to cases."""
    mask = None
    if call.user.type is not None:
        use = call.typed if counting is None else call.typed.first(counting.kept)
        mask = call.user.type.counts(call.user.block, call.user.module, use)
    valid = None if counting is None or counting.valid is None else counting.valid[: len(x)]
    if valid is not None and valid.shape == x.shape[:2] and valid.shape[1] > 1:
        mask = valid if mask is None else mask & valid
    return mask


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    if not x.is_floating_point():
        return torch.where(mask, x, -1)
    return x * mask.view(*mask.shape, *[1] * (x.dim() - 2))


def _flat(parts: list[Tensor], together: bool) -> tuple[Tensor, int | None]:
    """(n R, ...), the uses of a case beside each other where all have the same cases; and R."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1), parts[0].shape[1]
    if together:
        whole = torch.cat(parts, 1)
        return whole.flatten(0, 1), whole.shape[1]
    return torch.cat([part.flatten(0, 1) for part in parts]), None


def _count(inputs: list[Tensor], masks: list[Tensor | None]) -> int | Tensor | None:
    if all(mask is None for mask in masks):
        return None
    counts = [
        mask.sum() if mask is not None else torch.full((), x.shape[0] * x.shape[1], device=x.device)
        for x, mask in zip(inputs, masks, strict=True)
    ]
    return torch.stack(counts).sum()


def explained(block: ModelBlock, calls: list[Call], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The derivative by the parameters that rows and output gradients account for, aligned with `ModelBlock.view`.

    It differs from the whole one where a weight is used outside its module, and where a layer type is wrong.
    """
    like = block.parameters[0]
    if block.info.kind == "full":
        matrix = torch.zeros(block.info.shape, dtype=like.dtype, device=like.device)
        for call, g in zip(calls, gradients, strict=True):
            assert call.user.type is not None
            each = call.user.type.gradients(call.user.block, call.user.module, call.typed, _gradient(call, g))
            matrix += each.sum(0).view(matrix.shape)
        return block.split(matrix)
    total: list[Tensor] | None = None
    for call, g in zip(calls, gradients, strict=True):
        matrix = _product(call, rows_of(call), _outputs(call, _gradient(call, g)))
        if block.info.kind == "tied" and matrix.shape != block.info.shape:
            matrix = matrix.T
        parts = block.split(matrix)
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return total or block.split(torch.zeros(block.info.shape, dtype=like.dtype, device=like.device))


def _product(call: Call, x: Tensor, g: Tensor) -> Tensor:
    """Sum over rows of g abar^T, ([groups,] d_out, d_in)."""
    info = call.user.block
    mask = None if call.user.type is None else call.user.type.counts(info, call.user.module, call.typed)
    g = _masked(g, mask).reshape(-1, *g.shape[2:])
    if not x.is_floating_point():
        rows = x.reshape(-1).clamp_min(0)
        return g.new_zeros(info.d_in, info.d_out).index_add_(0, rows, g).T
    x = x.reshape(-1, *x.shape[2:])
    if info.groups > 1:
        return torch.einsum("rgo,rgi->goi", g, x)
    return g.T @ x


def as_vector(parts: Sequence[Tensor]) -> Tensor:
    """All their numbers, one after the other."""
    return torch.cat([part.reshape(-1) for part in parts])


def all_equal(calls: Sequence[Any], arrived: Sequence[Tensor | None], n: int) -> bool:
    """Whether the only call has several rows a case, and all rows of a case get one g that is not zero.

    Not asked of token numbers: their rows summed over a case are as wide as the vocabulary.
    """
    if len(calls) != 1 or arrived[0] is None or calls[0].user.type is None:
        return False
    call, g = calls[0], arrived[0]
    if not call.x.is_floating_point():
        return False
    rows = call.user.type.gradients(call.user.block, call.user.module, call.typed, g.to(call.dtype))
    if rows.shape[0] != n or rows.shape[1] < 2 or not bool(rows.any()):
        return False
    return bool((rows == rows[:, :1]).all())
