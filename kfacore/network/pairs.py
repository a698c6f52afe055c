"""Pairs of blocks that follow each other in a model: what a block-tridiagonal approximation may couple.

Block i comes before block j if the graph of j's input reaches the output of i with no other such block between them.
Both must be plain Kronecker products that are used once and have the same rows, position by position, so that a product
of their rows means something. Blocks of other kinds, as norms, do not stand between: in a transformer every other block
would be without a neighbour. A residual net has several such pairs a block, and circles among them; those that are
nearest in execution order are kept, as far as they form a forest, in which the coupling is exact (paper, section 4.3,
for a chain).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Chunk
from kfacore.network.rows import rows_of

__all__ = ["following", "nearest"]


def following(layers: Sequence[ModelBlock], chunk: Chunk, reduced: Collection[int] = ()) -> list[tuple[int, int]]:
    """Pairs (i, j), i directly before j, that could be coupled; a chain of Linear layers has all of its own.

    Args:
        layers: The blocks, in execution order.
        chunk: A forward pass with its graph.
        reduced: Blocks whose rows of a case are one: they share no positions with others.
    """
    single = {
        index: calls[0]
        for index, calls in enumerate(chunk.calls)
        if len(calls) == 1 and layers[index].info.plain and index not in reduced
    }
    # Blocks that are used several times stand between: which of their uses would be the neighbour?
    owner = {
        call.edge.node: index
        for index, calls in enumerate(chunk.calls)
        for call in calls
        if layers[index].info.plain and index not in reduced
    }
    candidates = [
        (i, j)
        for j, call in single.items()
        for i in nearest([following for following, _ in call.edge.node.next_functions], owner)
        if i in single
    ]
    with torch.no_grad():  # the layer type tells: a convolution's rows are not its input's
        rows = {index: rows_of(single[index]).shape[:2] for index in {each for pair in candidates for each in pair}}
    return sorted((i, j) for i, j in candidates if rows[i] == rows[j])


def nearest(roots: Iterable[Any], owner: Mapping[Any, int]) -> set[int]:
    """The blocks that are reached first on the way back from some nodes of the graph."""
    found: set[int] = set()
    stack, seen = list(roots), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in owner:
            found.add(owner[node])
        else:
            stack.extend(following for following, _ in node.next_functions)
    return found
