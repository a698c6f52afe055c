"""Vectors of parameter space: one flat tensor, seen as one matrix a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacore.network.blocks import ModelBlock
from kfacore.roles.block import Block

__all__ = ["BlockVector", "entries_of"]


_ALIGNMENT = 16
"""Rows of wide blocks start at multiples of this many entries: products written into rows of odd length are slow."""


class BlockVector:
    """A parameter-space vector stored once, with the views that each room wants.

    Attributes:
        flat: What dot products and sums act on; rows of blocks may be padded with entries that are always zero.
        blocks: Views ([groups,] d_out, d_in), one a block in execution order, what inverses act on.
        parts: Views aligned with those of the parameters (`ModelBlock.views`), what updates of the model act on.
    """

    def __init__(self, layers: Sequence[ModelBlock], flat: Tensor) -> None:
        self.layers = layers
        self.flat = flat
        self.blocks: list[Tensor] = []
        start = 0
        for layer in layers:
            info = layer.info
            stride = _stride(info)
            rows = flat[start : start + _rows(info) * stride].view(*info.shape[:-1], stride)
            self.blocks.append(rows[..., : info.d_in])
            start += entries_of(info)
        self.parts = [part for layer, block in zip(layers, self.blocks, strict=True) for part in layer.split(block)]

    @classmethod
    def zeros(cls, layers: Sequence[ModelBlock]) -> BlockVector:
        """The zero vector, on the parameters' device and in their dtype."""
        like = layers[0].parameters[0]
        total = sum(entries_of(layer.info) for layer in layers)
        return cls(layers, torch.zeros(total, dtype=like.dtype, device=like.device))

    def copy_blocks(self, blocks: Sequence[Tensor]) -> BlockVector:
        """Take the values of one matrix a block; returns self."""
        torch._foreach_copy_(self.blocks, list(blocks))
        return self

    def combine(self, mu: Tensor, other: BlockVector, alpha: Tensor) -> BlockVector:
        """Mu times itself plus alpha times another vector, in place, for scalars on the device; returns self."""
        self.flat.mul_(mu.to(self.flat.dtype)).addcmul_(other.flat, alpha.to(self.flat.dtype))
        return self


def entries_of(info: Block) -> int:
    """Entries that a block takes in a vector, those between its rows included."""
    return _rows(info) * _stride(info)


def _rows(info: Block) -> int:
    return info.groups * info.d_out


def _stride(info: Block) -> int:
    """Entries from one row of a block to the next."""
    narrow = info.kind == "diagonal" or info.d_in < 4 * _ALIGNMENT
    return info.d_in if narrow else -(-info.d_in // _ALIGNMENT) * _ALIGNMENT
