r"""Gradients of single cases, put together from rows: for statistics that see more than two factors of a block.

A case with R rows has the gradient, for each backward pass,

    M = sum over its rows of g_r abar_r^T,     (d_out, d_in), or one a group,

which for R = 1 is an outer product. A weight used as embedding and as head has the sum over both uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kfacore.curvature.moments import one_hot_rows
from kfacore.errors import UnsupportedModelError
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples

__all__ = ["case_chunks", "case_gradients"]

_CHUNK = 1 << 24
"""Numbers that the gradients of a chunk of cases may take."""


def case_gradients(
    block: Block,
    s: LayerSamples,
) -> Tensor:  # (k, N, *block.shape)
    """Gradients of all cases, pass by pass.

    Raises:
        UnsupportedModelError: Rows do not belong to cases, or the block has no gradients of cases; names it.
    """
    if block.kind == "full":
        return s.gradients.reshape(*s.gradients.shape[:2], *block.shape)
    if block.kind == "tied":
        found = _sums(s, block.d_in, block.d_out, block.name).mT  # the embedding's rows are one-hot in d_out
        return found if s.head is None else found + _sums(s.head, block.d_out, block.d_in, block.name)
    if block.kind == "diagonal":
        raise UnsupportedModelError(f"{block.name}: a block without a layer has no gradients of single examples")
    return _sums(s, block.d_out, block.d_in, block.name)


def _sums(s: LayerSamples, d_out: int, d_in: int, name: str) -> Tensor:
    """Sum over a case's rows of g abar^T, (k, N, [groups,] d_out, d_in)."""
    R = s.positions
    if R is None:
        raise UnsupportedModelError(
            f"{name}: its rows do not belong to examples in equal numbers, so that an example has no gradient by it; "
            "use approx = 'blockdiag' or 'tridiag', which need none"
        )
    x = s.inputs if s.inputs.is_floating_point() else one_hot_rows(s.inputs, d_in, s.gradients)
    if R == 1:
        return torch.einsum("kn...o,n...i->kn...oi", s.gradients, x)
    x, g = x.reshape(s.cases, R, *x.shape[1:]), s.gradients.reshape(-1, s.cases, R, *s.gradients.shape[2:])
    return torch.einsum("knr...o,nr...i->kn...oi", g, x)


def case_chunks(
    block: Block,
    s: LayerSamples,
) -> Iterator[Tensor]:  # (k, n, *block.shape)
    """`case_gradients` of a few cases at a time, so that memory is bounded."""
    passes = s.gradients.shape[0]
    tokens = 0 if s.inputs.is_floating_point() else max(block.d_in, block.d_out) * (s.positions or 1)
    step = max(1, _CHUNK // (passes * block.size + tokens))
    for start in range(0, s.cases, step):
        yield case_gradients(block, _some(s, start, min(start + step, s.cases)))


def _some(s: LayerSamples, start: int, stop: int) -> LayerSamples:
    """Cases start..stop-1."""
    R = s.positions or 1
    rows = slice(start * R, stop * R)
    head = None if s.head is None else _some(s.head, start, stop)
    return replace(s, inputs=s.inputs[rows], gradients=s.gradients[:, rows], head=head)
