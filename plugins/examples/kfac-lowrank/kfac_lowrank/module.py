"""A linear layer of low rank, written as one function: nothing in it is a module that hooks could watch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """y = U D x + b with D of (rank, inputs) and U of (outputs, rank).

    Args:
        inputs: Width of x.
        outputs: Width of y.
        rank: Inner width.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.down, std=inputs**-0.5)
        nn.init.normal_(self.up, std=rank**-0.5)

    def forward(
        self,
        x: Tensor,  # (..., inputs)
    ) -> Tensor:  # (..., outputs)
        """U D x + b."""
        return x @ self.down.T @ self.up.T + self.bias
