"""Vectors of parameter space: one flat tensor, seen as one weight block a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacore.linearize.rules import Layer

__all__ = ["BlockVector"]


class BlockVector:
    """A parameter-space vector stored once, with the views that each room wants.

    Attributes:
        flat: (P,), what dot products and sums act on.
        blocks: Views (d_out, d_in), one a layer in execution order, what inverses act on.
        parts: Views in the shapes of the layers' parameters, what updates of the model act on.
    """

    def __init__(self, layers: Sequence[Layer], flat: Tensor) -> None:
        self.layers = layers
        self.flat = flat
        self.blocks: list[Tensor] = []
        start = 0
        for layer in layers:
            self.blocks.append(flat[start : start + layer.info.size].view(layer.info.shape))
            start += layer.info.size
        self.parts = [part for layer, block in zip(layers, self.blocks, strict=True) for part in layer.split(block)]

    @classmethod
    def zeros(cls, layers: Sequence[Layer]) -> BlockVector:
        """The zero vector, on the parameters' device and in their dtype."""
        like = layers[0].parameters[0]
        total = sum(layer.info.size for layer in layers)
        return cls(layers, torch.zeros(total, dtype=like.dtype, device=like.device))

    def copy_blocks(self, blocks: Sequence[Tensor]) -> BlockVector:
        """Take the values of one matrix a layer; returns self."""
        torch._foreach_copy_(self.blocks, list(blocks))
        return self
