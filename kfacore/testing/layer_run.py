"""One call of a module as a layer type tells of it, with sums over rows: what the suite of layer types compares."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacore.roles.block import Block
from kfacore.roles.layer import Layer, Use

__all__ = ["NAME", "Run", "parameters_of"]

NAME = "m"
"""What the module is called."""

_SLICE = re.compile(r"^(?P<name>[^\[]+)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?$")


@dataclass
class Run:
    """One call of a module, its uses, and a random vector for every result."""

    layer: Layer
    module: nn.Module
    results: list[Tensor]
    vectors: list[Tensor]
    uses: list[Use]

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the module."""
        return list(self.layer.blocks(NAME, self.module))

    def of(self, block: Block) -> list[Use]:
        """The uses of a block."""
        return [use for use in self.uses if block.name == (f"{NAME}.{use.part}" if use.part else NAME)]

    def value(self) -> Tensor:
        """Sum over results of v . z, whose gradients are J^T v."""
        return torch.stack([(v * z).sum() for v, z in zip(self.vectors, self.results, strict=True)]).sum()

    def gradients(self, block: Block) -> list[Tensor]:
        """g of every use of a block."""
        assert self.of(block), f"{block.name}: the call told of no use of it"
        return list(torch.autograd.grad(self.value(), [use.output for use in self.of(block)], retain_graph=True))

    def per_case(self, block: Block) -> Tensor:
        """Sum over uses and counted rows of g abar^T, case by case, (n, *block.shape)."""
        sums = []
        for use, g in zip(self.of(block), self.gradients(block), strict=True):
            G = self.layer.gradients(block, self.module, use, g)
            if block.kind == "full":
                sums.append(G.unsqueeze(-2))
                continue
            X, counts = self.layer.rows(block, self.module, use), self.layer.counts(block, self.module, use)
            if not X.is_floating_point():
                X = nn.functional.one_hot(X, block.d_in).to(G)
            if counts is not None:
                G = G * counts.reshape(*counts.shape, *[1] * (G.dim() - 2))
            sums.append(torch.einsum("nr...o,nr...i->n...oi", G, X))
        return torch.stack(sums).sum(0)

    def sums(self) -> dict[str, Tensor]:
        """What rows and gradients say of the gradient by every block's matrix."""
        return {block.name: self.per_case(block).sum(0) for block in self.blocks}

    def compare(
        self, tolerance: float, matrices: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str = ""
    ) -> None:
        """The blocks' matrices against the parameters' gradients, seen through `split` and `view`."""
        scale = max([float(g.abs().max()) for g in wanted.values()], default=0.0)
        rest = {name: g.clone() for name, g in wanted.items()}
        for block in self.blocks:
            parts = self.layer.split(block, self.module, matrices[block.name])
            for part, view in zip(parts, self.layer.view(block, self.module, wanted), strict=True):
                error = float((part - view).abs().max()) / max(scale, 1e-30)
                assert error < tolerance, (
                    f"{block.name}: the sum over rows of g abar^T is not the gradient {what} "
                    f"(off by {error:.1e} of the largest entry)"
                )
            for view in self.layer.view(block, self.module, rest):
                view.zero_()
            for local, rows in parameters_of(block):
                left = float(rest[local][rows].abs().max())
                assert left <= tolerance * scale, f"{block.name}: entries of '{local}' with a gradient have no view"


def parameters_of(block: Block) -> Iterator[tuple[str, slice]]:
    """Local names and rows of a block's parameters."""
    for name in block.params:
        match = _SLICE.match(name)
        assert match, f"block '{block.name}': '{name}' is neither a parameter's name nor one with [start:stop]"
        local = match["name"].removeprefix(f"{NAME}.")
        yield local, slice(*(None if match[k] is None else int(match[k]) for k in ("start", "stop")))
