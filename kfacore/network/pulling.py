"""Backward passes by what the network asks for: edges and parameters, all as dense tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pulled"]


def pulled(
    z: Tensor,
    roots: Sequence[Any],
    v: Tensor,  # like z
    *,
    retain: bool,
) -> list[Tensor | None]:
    """J^T v by every root: None where z does not depend on it, dense where torch has only the rows that were used.

    Args:
        z: Outputs.
        roots: Tensors or gradient edges.
        v: The derivative by z.
        retain: Keep the graph.
    """
    found = torch.autograd.grad(z, roots, v.to(z.dtype), retain_graph=retain, allow_unused=True)
    return [g if g is None or g.layout == torch.strided else g.to_dense() for g in found]
