"""Plain facts about a preconditioned layer, shared by every room; knows nothing of torch modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LayerInfo", "share_of"]


@dataclass(frozen=True)
class LayerInfo:
    """One preconditioned layer, in execution order.

    Attributes:
        name: The module's qualified name in the model.
        d_in: Width of the homogeneous input abar: inputs plus 1 if there is a bias.
        d_out: Number of units.
        bias: Whether the last column of the weight block is a bias.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight block, (d_out, d_in)."""
        return self.d_out, self.d_in

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.d_out * self.d_in


def share_of(cases: int, share: float, least: int = 1) -> int:
    """The first ceil(share * cases) cases, at least one; immune to rounding of the product.

    Args:
        cases: Size of the mini-batch.
        share: tau_1 or tau_2, in (0, 1].
        least: No fewer than this, as far as there are so many.

    Returns:
        A number of cases in 1..cases.
    """
    return min(cases, max(least, math.ceil(share * cases - 1e-9)))
