"""Output vectors sent back through a forward pass, and what each block saw of them, as `LayerSamples`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Call, Chunk
from kfacore.network.pulling import pulled
from kfacore.network.rows import Counting, samples_of
from kfacore.roles.samples import LayerSamples

__all__ = ["Pass", "gather", "send_back"]


@dataclass(frozen=True)
class Pass:
    """What one backward pass brought.

    Attributes:
        calls: The gradient by the output of each call, block by block; None where nothing depends on it.
        loose: The gradient by the parameter of each block that no module reads, in the blocks' order; None where that
            is frozen.
    """

    calls: list[list[Tensor | None]]
    loose: list[Tensor | None]


def send_back(
    layers: Sequence[ModelBlock],
    chunk: Chunk,
    vectors: Tensor,  # (k, n, ..., o)
    scale: float = 1.0,
) -> list[Pass]:
    """Run k backward passes from z; the graph is kept and nothing is accumulated anywhere.

    Args:
        layers: The blocks.
        chunk: The forward pass.
        vectors: Derivatives by z.
        scale: Vectors travel multiplied by it, a power of two that keeps half precision from flushing them to zero;
            what arrives is divided by it in the parameters' dtype.
    """
    loose = [block.parameters[0] for block in layers if not block.users]
    edges = [call.edge for calls in chunk.calls for call in calls]
    passes = []
    for v in vectors.unbind(0):
        roots: list[Any] = [*edges, *(parameter for parameter in loose if parameter.requires_grad)]
        found = pulled(chunk.z, roots, v if scale == 1.0 else v * scale, retain=True)
        if scale != 1.0:
            dtype = layers[0].parameters[0].dtype
            found = [None if g is None else g.to(dtype) / scale for g in found]
        arrived = iter(found)
        by_call: list[list[Tensor | None]] = [[next(arrived) for _ in calls] for calls in chunk.calls]
        passes.append(Pass(by_call, [next(arrived) if parameter.requires_grad else None for parameter in loose]))
    return passes


def gather(
    layers: Sequence[ModelBlock],
    calls: Sequence[list[Call]],
    passes: Sequence[Pass],
    counting: Counting,
    reduced: Collection[int],
) -> list[LayerSamples | None]:
    """What each block saw; None for one that was not used.

    Args:
        layers: The blocks.
        calls: The calls of each.
        passes: The backward passes.
        counting: What counts.
        reduced: Positions of the blocks whose rows of a case are one.
    """
    samples: list[LayerSamples | None] = []
    other = 0
    for index, (block, own) in enumerate(zip(layers, calls, strict=True)):
        if not block.users:
            samples.append(_diagonal(block, [one.loose[other] for one in passes], counting))
            other += 1
        elif own:
            mine = [one.calls[index] for one in passes]
            samples.append(samples_of(block, own, mine, counting, index in reduced))
        else:
            samples.append(None)
    return samples


def _diagonal(block: ModelBlock, found: Sequence[Tensor | None], counting: Counting) -> LayerSamples:
    """Each pass's whole gradient: with vectors independent between cases its square is S times the diagonal, in the
    mean, because the products of two cases vanish.
    """  # noqa: D205
    like = block.parameters[0]
    rows = [torch.zeros_like(like, requires_grad=False) if g is None else g for g in found]
    gradients = torch.stack([g.reshape(1, -1) for g in rows]).to(like.dtype)
    return LayerSamples(gradients.new_empty(0), gradients, None, None, counting.total)
