"""What is known of a model, and how outputs of two passes are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kfacore.nest import tensors_of

__all__ = ["Facts", "Way", "agreed", "close", "common_cases", "equal"]

Way = Literal["forward", "double", "none"]
"""How J v is taken: forward mode, double backward, or not at all."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model in one setting of its training modes.

    Attributes:
        cut: Whether a mini-batch may be cut by cases: each case's outputs depend on it alone and not on its place.
        draws: Names of the generators that a forward pass draws from.
        keeps: Whether a forward pass moves buffers or attributes of modules.
        mixes: Whether the outputs of a case depend on other cases; also if that is not known.
        way: How J v is taken.
        reason: Why not in forward mode, or why not at all.
        whole: Why a mini-batch is not cut; empty if it is.
        overwrites: Whether the model writes into its inputs, so that every pass needs its own.
        settled: Whether the numbers of this mini-batch could show it.
        outside: Positions of the blocks whose rows do not account for the whole gradient.
        pooled: Positions of the blocks where all rows of a case get the same g.
        axes: Positions of the blocks whose outputs do not have the cases first, with the dimension that has them (1 for
            positions first), or None where rows do not belong to cases.
    """

    cut: bool
    draws: tuple[str, ...]
    keeps: bool
    mixes: bool
    way: Way
    reason: str
    whole: str
    settled: bool
    overwrites: bool = False
    outside: frozenset[int] = frozenset()
    pooled: frozenset[int] = frozenset()
    axes: tuple[tuple[int, int | None], ...] = ()


def agreed(found: Sequence[Facts]) -> Facts:
    """What several processes may rely on, each of which looked at its own part of a mini-batch."""
    ways: tuple[Way, ...] = ("forward", "double", "none")
    worst = max(found, key=lambda facts: ways.index(facts.way))
    axes: dict[int, int | None] = {}
    for index in dict.fromkeys(index for facts in found for index, _ in facts.axes):
        own = {dict(facts.axes).get(index, 0) for facts in found}
        axes[index] = own.pop() if len(own) == 1 else None
    return Facts(
        cut=all(facts.cut for facts in found),
        draws=tuple(dict.fromkeys(name for facts in found for name in facts.draws)),
        keeps=any(facts.keeps for facts in found),
        mixes=any(facts.mixes for facts in found),
        way=worst.way,
        reason=worst.reason,
        whole=next((facts.whole for facts in found if not facts.cut), ""),
        settled=all(facts.settled for facts in found),
        overwrites=any(facts.overwrites for facts in found),
        outside=frozenset().union(*(facts.outside for facts in found)),
        pooled=frozenset.intersection(*(facts.pooled for facts in found)),
        axes=tuple(axes.items()),
    )


def common_cases(nest: Any) -> int | None:
    """Number of cases if every tensor of the nest has it as first dimension and nothing else could; else None."""
    sizes = {tuple(tensor.shape[:1]) for tensor in tensors_of(nest)}
    if len(sizes) != 1 or () in sizes:
        return None
    (count,) = sizes.pop()
    return None if _other_lengths(nest, count) else count


def _other_lengths(nest: Any, count: int) -> bool:
    """Whether something that is no nest of tensors is as long as there are cases: it may belong to them."""
    if isinstance(nest, Tensor | str | bytes):
        return False
    if isinstance(nest, dict):
        return any(_other_lengths(value, count) for value in nest.values())
    if isinstance(nest, list | tuple):
        if len(nest) == count and not all(isinstance(value, Tensor) for value in nest):
            return True
        return any(_other_lengths(value, count) for value in nest)
    try:
        return len(nest) == count
    except TypeError:
        return False


def close(x: Tensor, y: Tensor, *, loose: bool = False) -> bool:
    """Equal up to rounding: sums over other numbers of rows may be taken in another order."""
    if x.shape != y.shape:
        return False
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        return True  # not this check's business: the step reports what is not finite
    if x.numel() == 0:
        return True
    scale = max(float(y.abs().max()), float(x.abs().max()))
    eps = torch.finfo(x.dtype).eps
    share = 3.0 * math.sqrt(eps) if loose else 1e3 * eps
    return float((x - y).abs().max()) <= share * scale + torch.finfo(x.dtype).tiny


def equal(x: Tensor, y: Tensor) -> bool:
    """The same numbers from the same operations on tensors of the same shapes: only summation by threads may differ."""
    if x.numel() == 0 or torch.equal(x, y):
        return True
    if not bool(torch.isfinite(x).all()):
        return not bool(torch.isfinite(y).all())
    return float((x - y).abs().max()) <= 16.0 * torch.finfo(x.dtype).eps * float(y.abs().max())
