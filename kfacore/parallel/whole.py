"""A mini-batch that several processes share: which of its cases are whose.

The whole mini-batch is the parts laid one into the other, in proportion to their sizes: case i of a part of n stands at
(i + 1/2) / n of the way. Any number of the first cases of the whole is then a number of the first cases of each part,
about the same share of each, so that work on the first cases is spread evenly. Parts of the same size, or of sizes
that differ by one, are every W-th case of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

__all__ = ["Whole", "interleaved"]


@lru_cache(maxsize=16)
def interleaved(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Where the cases of each part stand in the whole mini-batch.

    Args:
        sizes: Cases of each part, in the order of the ranks.

    Returns:
        One tensor of integers a part, (n_r,), ascending; together they are 0..n-1.
    """
    keys = torch.cat([(2 * torch.arange(n, dtype=torch.float64) + 1) / max(1, 2 * n) for n in sizes])
    places = torch.empty(len(keys), dtype=torch.long)
    places[torch.argsort(keys, stable=True)] = torch.arange(len(keys))
    return torch.split(places, list(sizes))


@dataclass(frozen=True)
class Whole:
    """The mini-batch of all processes, seen from one of them.

    Attributes:
        sizes: Cases of each part.
        rank: Whose part is one's own.
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def cases(self) -> int:
        """Cases of the whole."""
        return sum(self.sizes)

    @cached_property
    def places(self) -> Tensor:  # (n_r,)
        """Where one's own cases stand in the whole."""
        return interleaved(self.sizes)[self.rank]

    def first(self, cases: int) -> int:
        """How many of one's own are among the first cases of the whole: one's own first."""
        if len(self.sizes) == 1 or cases >= self.cases:
            return min(cases, self.sizes[self.rank])
        return int(torch.searchsorted(self.places, cases))
