"""Blocks of every kind with random samples of several rows a case, and the curvature that serves them all."""

from __future__ import annotations

from typing import Any

import dense
import torch

from kfac_plugins.approx import BlockDiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfacore.curvature.joined import Joined
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block, Side
from kfacore.roles.moment import Moments

Float = torch.float64
CASES, ROWS = 5, 3

BLOCKS = {
    "plain": Block("plain", 4, 3, True),
    "groups": Block("groups", 3, 2, True, groups=4),
    "wide output": Block("wide", 3, 5, False, output_side=Side.DIAGONAL),
    "wide groups": Block("wide groups", 3, 2, False, groups=2, input_side=Side.DIAGONAL),
    "embedding": Block("embedding", 6, 3, False, input_side=Side.DIAGONAL),
    "full": Block("full", 5, 1, True, kind="full"),
    "channels": Block("channels", 2, 1, True, groups=3, kind="full"),
    "raw": Block("raw", 7, 1, False, kind="diagonal"),
    "tied": Block("tied", 3, 6, False, kind="tied"),
    "wide tied": Block("wide tied", 3, 6, False, kind="tied", output_side=Side.DIAGONAL),
}


def samples(block: Block, seed: int = 0, passes: int = 2) -> LayerSamples:
    n, groups = CASES * ROWS, (block.groups,) if block.groups > 1 else ()
    tokens = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed))
    if block.kind == "full":
        return LayerSamples(torch.empty(0), dense.randn(passes, CASES, *groups, block.d_in, seed=seed), total=CASES)
    if block.kind == "diagonal":
        return LayerSamples(torch.empty(0), dense.randn(passes, CASES, block.d_in, seed=seed), total=CASES)
    if block.kind == "tied":
        inputs, g = dense.randn(n, block.d_in, seed=seed), dense.randn(passes, n, block.d_out, seed=seed + 1)
        head = LayerSamples(inputs, g, ROWS)
        return LayerSamples(tokens, dense.randn(passes, n, block.d_in, seed=seed + 2), ROWS, head=head)
    inputs = tokens if block.name == "embedding" else dense.randn(n, *groups, block.d_in, seed=seed)
    return LayerSamples(inputs, dense.randn(passes, n, *groups, block.d_out, seed=seed + 1), ROWS)


def joined(blocks: list[Block], power: float = 1.0, **options: Any) -> tuple[Joined, Moments]:
    found = Joined(BlockDiagonal(BlockDiagonalConfig(power=power)), blocks, **options)
    return found, found.start(torch.zeros((), dtype=Float))
