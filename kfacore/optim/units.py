r"""What the weights of each block are measured in, so that lambda does not depend on the units of the data.

Inputs in another unit, a -> u a, want weights W -> W / u: nothing else about the network changes, but lambda I and
pi gamma I bound the weights of that block u^2 times as much, and those of all others as before. In coordinates
theta' = D^1/2 theta, with D = u_i^2 on the weights of block i and 1 on its bias, all of K-FAC is what it was:

    abar' = (a / u, 1),                             g' = D^-1/2 g,
    F-hat^-1 g = D^-1/2 F-hat'^-1 g',               theta'^T theta' = theta^T D theta.

The size of inputs is that of the numbers that are not 0, a mean of logarithms over the block's inputs, in the first
step. Between 0.03 and 3 they are left alone, to the bit: in that range lambda's own adaptation does what there is to
do. For others u_i is a power of ten, so that what is left does not depend on chance: of sizes between 0.2 and 1.7 times
a power of ten, where most data is, exactly that power.

Weight decay is of theta. In gamma = sqrt(lambda + eta) eta is measured as lambda is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kfacore.network import BlockVector, ModelBlock
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples, Samples

__all__ = ["Units", "sizes_of", "units_of"]

_SMALL, _LARGE = 0.03, 3.0
"""Sizes between which inputs are in the usual unit, 1."""

_USUAL = 0.55
"""Between those of pixels, about 0.3, and of standardised columns, 1: both are in this unit times a power of ten."""

Solve = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""F-hat'^-1 v, written over the second argument."""


class Units:
    """The unit of each block's inputs; all 1 until they are set.

    Attributes:
        values: u, one a block; None where all are 1.
        metric: D as one vector, None likewise.
    """

    def __init__(self) -> None:
        self.values: list[float] | None = None
        self.metric: Tensor | None = None
        self._inverse: Tensor | None = None
        self._spare: BlockVector | None = None

    @property
    def vectors(self) -> int:
        """Vectors as long as the parameters that are kept."""
        return 0 if self.values is None else 3

    def set(self, values: Sequence[float] | None, layers: Sequence[ModelBlock]) -> None:
        """Take up one unit a block; ``None`` or nothing but 1 is the parameters' own unit."""
        self.values = self.metric = self._inverse = self._spare = None
        if values is None or all(u == 1.0 for u in values):
            return
        self.values = [float(u) for u in values]
        self._spare = unit = BlockVector.zeros(layers)
        unit.flat.fill_(1.0)
        for layer, block, u in zip(layers, unit.blocks, self.values, strict=True):
            block[..., : layer.info.d_in - layer.info.bias].fill_(u)
        self.metric, self._inverse = unit.flat.square(), unit.flat.reciprocal()

    def of(self, samples: Samples) -> Samples:
        """The same samples with inputs in their unit."""
        if self.values is None:
            return samples
        assert self._spare is not None
        blocks = [layer.info for layer in self._spare.layers]
        known = zip(samples, blocks, self.values, strict=True)
        return [s if s is None or u == 1.0 else _divided(s, block, u) for s, block, u in known]

    def solve(self, solve: Solve, v: BlockVector, out: BlockVector) -> None:
        """D^-1/2 F-hat'^-1 D^-1/2 v, written over ``out``."""
        if self._inverse is None:
            solve(v.blocks, out.blocks)
            return
        assert self._spare is not None
        torch.mul(v.flat, self._inverse, out=self._spare.flat)
        solve(self._spare.blocks, out.blocks)
        out.flat.mul_(self._inverse)


def sizes_of(parts: Iterable[Samples], blocks: Sequence[Block], device: torch.device) -> list[Tensor]:
    """Sum of squares and number of what is not 0, by input of each block, (2, inputs) float64: processes add them up.

    Of inputs of Kronecker products, without the homogeneous 1: token numbers and the parameters of norms have no unit
    that data could change.
    """
    sums = [torch.zeros(2, block.d_in - block.bias, dtype=torch.float64, device=device) for block in blocks]
    for samples in parts:
        for s, block, own in zip(samples, blocks, sums, strict=True):
            if s is None or block.kind != "kron" or not s.inputs.is_floating_point() or not s.inputs.numel():
                continue
            inputs = s.inputs[..., : block.d_in - block.bias].double().flatten(0, -2)
            own += torch.stack([inputs.square().sum(0), (inputs != 0).sum(0)])
    return sums


def units_of(sizes: Sequence[Tensor]) -> list[float]:
    """u of each block from `sizes_of`; 1 where there was nothing, or something that is not finite.

    Where columns come in many units, the largest do not decide for all: sizes are averaged as logarithms.
    """
    found = []
    for squares, counts in sizes:
        logs = (squares / counts)[counts > 0].log() / math.log(100.0)
        size = 10.0 ** float(logs.mean()) if len(logs) and bool(logs.isfinite().all()) else _USUAL
        usual = _SMALL <= size <= _LARGE
        found.append(1.0 if usual else 10.0 ** round(math.log10(size / _USUAL)))
    return found


def _divided(s: LayerSamples, block: Block, u: float) -> LayerSamples:
    """With abar' = (a / u, 1)."""
    inputs = s.inputs / u
    if block.bias:
        inputs[..., -1] = s.inputs[..., -1]
    return replace(s, inputs=inputs)
