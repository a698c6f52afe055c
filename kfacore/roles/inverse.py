"""A damped approximation of the Fisher at one gamma, ready to be applied; and what must not pass in silence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.roles.block import Block

__all__ = ["Inverse", "Notice"]


@dataclass(frozen=True)
class Notice:
    """Something that must not pass in silence: a factor that needed double precision or more jitter.

    Attributes:
        layer: Name of the layer.
        message: What happened and what was done.
    """

    layer: str
    message: str

    def __str__(self) -> str:
        """Layer first, as people look for it."""
        return f"{self.layer}: {self.message}"


class Inverse(ABC):
    """A damped approximation F-hat at one gamma, ready to be applied. Immutable.

    Blocks are the layers' weight blocks, `Block.shape` each, in execution order.
    """

    layers: Sequence[Block]
    notices: tuple[Notice, ...] = ()

    @abstractmethod
    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 v."""

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """F-hat^-1 v written over ``out``; worth an implementation where it saves the copy.

        Raises:
            ValueError: `solve` returned something else than one tensor a block of its shape: copying would broadcast.
        """
        found = self.solve(blocks)
        if len(found) != len(out):
            raise ValueError(f"solve returned {len(found)} tensors for {len(out)} blocks")
        for layer, own, wanted in zip(self.layers, found, out, strict=True):
            if own.shape != wanted.shape:
                raise ValueError(
                    f"solve returned {tuple(own.shape)} for the block {layer.name}, which is {tuple(wanted.shape)}"
                )
        torch._foreach_copy_(list(out), found)

    @abstractmethod
    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat v, the inverse of `solve`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and containers from which the approximation's `load_inverse` restores it bit for bit."""

    def dense(self, *, inverse: bool = True) -> Tensor:
        """The matrix of `solve` (or of `multiply`), for small nets: parameters layer by layer, columns stacked.

        Returns:
            (P, P), in the blocks' dtype; vec stacks the columns of each (d_out, d_in) block, group by group.
        """
        apply = self.solve if inverse else self.multiply
        probe = self._like()
        total = sum(layer.size for layer in self.layers)
        columns = []
        for position in range(total):
            unit = torch.zeros(total, dtype=probe.dtype, device=probe.device)
            unit[position] = 1.0
            blocks, start = [], 0
            for layer in self.layers:
                *groups, d_out, d_in = layer.shape
                blocks.append(unit[start : start + layer.size].reshape(*groups, d_in, d_out).mT)
                start += layer.size
            columns.append(torch.cat([block.mT.reshape(-1) for block in apply(blocks)]))
        return torch.stack(columns, dim=1)

    @abstractmethod
    def _like(self) -> Tensor:
        """Any tensor of the inverse, for its dtype and device."""
