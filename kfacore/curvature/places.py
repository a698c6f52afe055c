"""What each running average of a net is of: a block, a pair of blocks, or all of them.

So an average is known by the same name to the whole net and to whoever keeps a part of it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kfacore.curvature.joined import Joined, Part
from kfacore.roles.moment import Moment

__all__ = ["Average", "averages", "by_name", "from_names"]


class Average(NamedTuple):
    """One running average.

    Attributes:
        block: Position of its block, of a pair's first; None where it is of all blocks together.
        kind: Its class.
        which: The how many-th value of its kind that this block, or pair, has, from 0.
        shape: Its shape.
        other: Position of a pair's second block; None where it is of no pair.
    """

    block: int | None
    kind: type[Moment]
    which: int
    shape: tuple[int, ...]
    other: int | None = None

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def averages(joined: Joined) -> Iterator[Average]:
    """All running averages of a net, without their memory."""
    for part in _parts(joined):
        for places in part.values():
            yield from places


def by_name(joined: Joined, blocks: Sequence[int], state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The averages of a saved state with their counts, [value, k], by names that do not depend on who keeps them.

    Args:
        joined: Who serves which of these blocks.
        blocks: Their numbers in the net.
        state: `Moments.state_dict` of ``joined.start``.
    """
    saved = [state] if joined.alone else state["parts"]
    return {
        _name(place, blocks): [own["values"][kind][k], own["counts"][kind][k]]
        for part, own in zip(_parts(joined), saved, strict=True)
        for kind, places in part.items()
        for k, place in enumerate(places)
    }


def from_names(joined: Joined, blocks: Sequence[int], named: Mapping[str, Sequence[Any]], updates: int) -> Any:
    """The other way round: a state for `Moments.load_state_dict`."""
    parts = []
    for part in _parts(joined):
        found = {kind: [named[_name(place, blocks)] for place in places] for kind, places in part.items()}
        values = {kind: [value for value, _ in each] for kind, each in found.items()}
        counts = {kind: [k for _, k in each] for kind, each in found.items()}
        parts.append({"updates": updates, "counts": counts, "values": values})
    return parts[0] if joined.alone else {"updates": updates, "parts": parts}


def _name(place: Average, blocks: Sequence[int]) -> str:
    of = ["all" if place.block is None else str(blocks[place.block])]
    of += [] if place.other is None else [str(blocks[place.other])]
    return " ".join([place.kind.__name__, *of, str(place.which)])


def _parts(joined: Joined) -> list[dict[str, list[Average]]]:
    """Part by part, by the names of their kinds."""
    if not joined.parts:  # no block at all
        return [{kind.__name__: [] for kind in joined.approx.moments}]
    found = []
    for part in joined.parts:
        inside = set(part.indices)
        pairs = [(i, j) for i, j in joined.pairs if i in inside and j in inside]
        found.append({kind.__name__: _of(kind, part, pairs) for kind in part.curvature.moments})
    return found


def _of(kind: type[Moment], part: Part, pairs: Sequence[tuple[int, int]]) -> list[Average]:
    """Those of one kind: of each block, of each pair if pairs change their number, or of all blocks together."""
    local = {index: i for i, index in enumerate(part.indices)}
    nothing = torch.empty(0, device="meta")
    alone, whole = (kind(part.layers, nothing, own).values for own in ([], [(local[i], local[j]) for i, j in pairs]))
    of: list[tuple[int, int | None]] = list(pairs)
    if len(alone) == len(whole):
        of = [(i, None) for i in part.indices]
    if not of or len(whole) % len(of):
        return [Average(None, kind, k, tuple(value.shape)) for k, value in enumerate(whole)]
    places = [(*of[k % len(of)], k // len(of)) for k in range(len(whole))]
    return [
        Average(block, kind, which, tuple(value.shape), other)
        for (block, other, which), value in zip(places, whole, strict=True)
    ]
