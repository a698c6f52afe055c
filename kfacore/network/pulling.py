"""Backward passes by what the network asks for: edges and parameters, all as dense tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import UnsupportedModelError

__all__ = ["is_reentrant", "pulled", "pulled_whole"]


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


def pulled_whole(z: Tensor, roots: Sequence[Any], v: Tensor) -> list[Tensor | None]:
    """`pulled` of a graph that is kept.

    Raises:
        UnsupportedModelError: A part of it gives no gradients by parameters.
    """
    if is_reentrant(z):  # it would give no gradients at all, without a word
        raise UnsupportedModelError(
            "a part of the model is checkpointed by a reentrant function that is not torch's, which gives no gradients "
            "by parameters; use torch.utils.checkpoint.checkpoint"
        )
    return pulled(z, roots, v, retain=True)


def is_reentrant(z: Tensor) -> bool:
    """Whether the graph has a node of reentrant checkpoints; torch's own run in their other form here."""
    stack, seen = [z.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return True
        stack += [following for following, _ in node.next_functions]
    return False
