"""Vectors of parameter space: one flat tensor, seen as one weight block a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacore.network.rules import Layer

__all__ = ["BlockVector"]


_ALIGNMENT = 16
"""Rows of wide blocks start at multiples of this many entries: products written into rows of odd length are slow."""


class BlockVector:
    """A parameter-space vector stored once, with the views that each room wants.

    Attributes:
        flat: What dot products and sums act on; rows of blocks may be padded with entries that are always zero.
        blocks: Views (d_out, d_in), one a layer in execution order, what inverses act on.
        parts: Views in the shapes of the layers' parameters, what updates of the model act on.
    """

    def __init__(self, layers: Sequence[Layer], flat: Tensor) -> None:
        self.layers = layers
        self.flat = flat
        self.blocks: list[Tensor] = []
        start = 0
        for layer in layers:
            d_out, d_in = layer.info.shape
            stride = _stride(d_in)
            self.blocks.append(flat[start : start + d_out * stride].view(d_out, stride)[:, :d_in])
            start += d_out * stride
        self.parts = [part for layer, block in zip(layers, self.blocks, strict=True) for part in layer.split(block)]

    @classmethod
    def zeros(cls, layers: Sequence[Layer]) -> BlockVector:
        """The zero vector, on the parameters' device and in their dtype."""
        like = layers[0].parameters[0]
        total = sum(layer.info.d_out * _stride(layer.info.d_in) for layer in layers)
        return cls(layers, torch.zeros(total, dtype=like.dtype, device=like.device))

    def copy_blocks(self, blocks: Sequence[Tensor]) -> BlockVector:
        """Take the values of one matrix a layer; returns self."""
        torch._foreach_copy_(self.blocks, list(blocks))
        return self

    def combine(self, mu: Tensor, other: BlockVector, alpha: Tensor) -> BlockVector:
        """Mu times itself plus alpha times another vector, in place, for scalars on the device; returns self."""
        self.flat.mul_(mu.to(self.flat.dtype)).addcmul_(other.flat, alpha.to(self.flat.dtype))
        return self


def _stride(d_in: int) -> int:
    """Entries from one row of a block to the next."""
    return d_in if d_in < 4 * _ALIGNMENT else -(-d_in // _ALIGNMENT) * _ALIGNMENT
