r"""Forests of blocks: which pairs are worth coupling, and in which order such a coupling is undone.

With Gaussian variables whose dependencies form a forest the mutual information of all of them is the sum over its edges
of the two ends'; so among all forests the one of largest total weight is nearest to the Fisher in the sense of
Kullback and Leibler (Chow & Liu 1968). For a pair of blocks whose inputs and gradients have the canonical correlations
r_A and r_G, the block pair has the correlations rho = r_G r_A, one for each product, and

    I = -1/2 sum over products of log(1 - rho^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfacore.errors import ConfigError

__all__ = ["Step", "forest", "leaves_first", "mutual_information", "nearest"]


def mutual_information(
    s_G: Tensor,  # (k_G,)
    s_A: Tensor,  # (k_A,)
) -> Tensor:  # ()
    """I of a pair of blocks, in nats, from the squared canonical correlations of both sides, in [0, 1)."""
    return -0.5 * torch.log1p(-torch.outer(s_G, s_A)).sum()


def forest(pairs: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of a maximal spanning forest (Kruskal 1956), in the order in which they were given.

    Args:
        pairs: Candidates (i, j), any graph.
        weights: One a pair; of equal ones the earlier pair is taken. A pair whose weight is not above 0 never is.

    Returns:
        Pairs without a circle, of the largest total weight.
    """
    root: dict[int, int] = {}
    kept = []
    for k in sorted(range(len(pairs)), key=lambda k: (-weights[k], k)):
        a, b = (_root_of(root, node) for node in pairs[k])
        if weights[k] > 0 and a != b:
            root[a] = b
            kept.append(k)
    return [pairs[k] for k in sorted(kept)]


def nearest(pairs: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    """Of pairs that could be coupled a forest, the nearest ones in execution order first; None stays None, a chain."""
    return None if pairs is None else forest(pairs, [1.0 / abs(j - i) for i, j in pairs])


def _root_of(root: dict[int, int], node: int) -> int:
    while node in root:
        node = root[node]
    return node


class Step(NamedTuple):
    """A node in the order of elimination.

    Attributes:
        node: The node.
        parent: Its parent; itself if it is a root.
        pair: Index of the pair that connects it with its parent; None if it is a root.
        down: Whether it is the first of that pair.
    """

    node: int
    parent: int
    pair: int | None
    down: bool


def leaves_first(count: int, pairs: Sequence[tuple[int, int]]) -> list[Step]:
    """Every node before its parent; the root of each tree is its last node.

    Args:
        count: Number of nodes.
        pairs: Edges (i, j).

    Raises:
        ConfigError: The pairs contain a circle.
    """
    neighbours: list[list[tuple[int, int, bool]]] = [
        [] for _ in range(count)
    ]  # (other, pair, this is the pair's first)
    for k, (i, j) in enumerate(pairs):
        neighbours[i].append((j, k, True))
        neighbours[j].append((i, k, False))
    found: list[Step] = []
    seen: set[int] = set()
    for root in reversed(range(count)):
        waiting = [] if root in seen else [Step(root, root, None, down=False)]
        while waiting:
            step = waiting.pop()
            if step.node in seen:
                raise ConfigError(f"the pairs {list(pairs)} are no forest: block {step.node} is reached in two ways")
            seen.add(step.node)
            found.append(step)
            for other, k, first in neighbours[step.node]:
                if k != step.pair:
                    waiting.append(Step(other, step.node, k, not first))
    return found[::-1]
