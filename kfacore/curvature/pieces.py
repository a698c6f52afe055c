"""An inverse in pieces: each was made of some blocks, and counts for some of these.

Where processes keep a part of the blocks each, a saved inverse is the pieces of all of them. Whoever takes it up, one
process or any number, keeps those pieces that its own blocks are in. A piece that has more blocks than are wanted is
asked with zeros for the others: blocks that no pair couples have nothing to do with each other
(`Approximation.divides`). At the next refresh there is one piece again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.curvature.joined import Joined
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice

__all__ = ["Piece", "Pieces", "load_pieces", "part_of"]


@dataclass(frozen=True)
class Piece:
    """An inverse of some blocks of a net.

    Attributes:
        blocks: Numbers of the blocks that it was made of.
        kept: Those that it counts for.
        inverse: Of these blocks.
    """

    blocks: Sequence[int]
    kept: Sequence[int]
    inverse: Inverse


class Pieces(Inverse):
    """F-hat of the blocks that are kept by any of the pieces; other blocks are left as they are.

    Args:
        layers: All blocks of the net.
        pieces: No two of them keep the same block.
        notices: What must be reported.
    """

    def __init__(self, layers: Sequence[Block], pieces: Sequence[Piece], notices: Sequence[Notice] = ()) -> None:
        self.layers, self.pieces = layers, list(pieces)
        self.notices = tuple(notices) or tuple(notice for piece in pieces for notice in piece.inverse.notices)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Piece by piece; zero for blocks that are not kept."""
        out = [torch.zeros_like(block) for block in blocks]
        self.solve_into(blocks, out)
        return out

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Piece by piece, over those of ``out`` that are kept."""
        for piece in self.pieces:
            if list(piece.kept) == list(piece.blocks):
                piece.inverse.solve_into([blocks[i] for i in piece.blocks], [out[i] for i in piece.blocks])
            else:
                _copy(piece, piece.inverse.solve(_padded(piece, blocks, self._shapes(piece))), out)

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Piece by piece; zero for blocks that are not kept."""
        out = [torch.zeros_like(block) for block in blocks]
        for piece in self.pieces:
            _copy(piece, piece.inverse.multiply(_padded(piece, blocks, self._shapes(piece))), out)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Every piece."""
        return {
            "owned": [
                {"blocks": list(piece.blocks), "kept": list(piece.kept), "inverse": piece.inverse.state_dict()}
                for piece in self.pieces
            ]
        }

    def _shapes(self, piece: Piece) -> list[tuple[int, ...]]:
        return [self.layers[i].shape for i in piece.blocks]

    def _like(self) -> Tensor:
        return self.pieces[0].inverse._like()


def _padded(piece: Piece, blocks: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """What the inverse is asked: zeros for blocks that do not count."""
    kept = set(piece.kept)
    like = blocks[piece.kept[0]]  # others may not be here at all
    return [blocks[i] if i in kept else like.new_zeros(shape) for i, shape in zip(piece.blocks, shapes, strict=True)]


def _copy(piece: Piece, found: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    kept = set(piece.kept)
    for i, tensor in zip(piece.blocks, found, strict=True):
        if i in kept:
            out[i].copy_(tensor)


def part_of(joined: Joined, blocks: Sequence[int]) -> Joined:
    """The curvature of some of the blocks, numbered from 0, with those pairs that lie among them."""
    local = {block: i for i, block in enumerate(blocks)}
    pairs = [(local[i], local[j]) for i, j in joined.pairs if i in local and j in local]
    return Joined(joined.approx, [joined.layers[i] for i in blocks], pairs)


def load_pieces(joined: Joined, state: Mapping[str, Any], wanted: Collection[int]) -> Pieces:
    """The pieces of a saved inverse that some blocks are in.

    Args:
        joined: The curvature of all blocks.
        state: What `Inverse.state_dict` gave of them, of one or in pieces.
        wanted: The blocks.
    """
    everything = list(range(len(joined.layers)))
    whole = {"blocks": everything, "kept": everything, "inverse": state}
    saved: Sequence[Mapping[str, Any]] = state.get("owned", [whole])
    found = []
    for each in saved:
        kept = [i for i in each["kept"] if i in wanted]
        if kept:
            own = part_of(joined, each["blocks"])
            found.append(Piece(each["blocks"], kept, own.load_inverse(each["inverse"])))
    return Pieces(joined.layers, found)
