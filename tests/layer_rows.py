"""A small stand-in for the network: rows and output gradients of every block of a model, with plain hooks and autograd.

One backward pass for every case, position and term of F_R: exact expectations over the model's targets have no products
between positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.registry import get_registry
from kfacore.roles import Block, Layer, Likelihood, Use


@dataclass
class Seen:
    """A block and the uses of a forward pass."""

    block: Block
    layer: Layer
    module: nn.Module
    uses: list[Use] = field(default_factory=list)

    def rows(self, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of all uses, (n, R, groups, d_in), and which count, (n, R)."""
        rows, counts = [], []
        for use in self.uses:
            X = self.layer.rows(self.block, self.module, use)
            if not X.is_floating_point():
                X = nn.functional.one_hot(X, self.block.d_in).double()
            count = self.layer.counts(self.block, self.module, use)
            counts.append(torch.ones(X.shape[:2], dtype=torch.bool) if count is None else count)
            rows.append(X if self.block.groups > 1 else X.unsqueeze(2))
        X, count = torch.cat(rows, 1), torch.cat(counts, 1)
        if valid is not None and valid.shape == count.shape:
            count = count & valid
        return X * count[:, :, None, None], count

    def gradients(self, vectors: list[Tensor]) -> Tensor:
        """g of every row of all uses, (n, R, groups, d_out); of a ``full`` block (n, 1, groups, d_in)."""
        found = []
        for use, g in zip(self.uses, vectors, strict=True):
            G = self.layer.gradients(self.block, self.module, use, g)
            G = G if self.block.groups > 1 else G.unsqueeze(-2)
            found.append(G.unsqueeze(1) if self.block.kind == "full" else G)
        return torch.cat(found, 1)


def watch(model: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Seen]]:
    """z of a call and what every block saw in it."""
    layers, seen, undo = get_registry().layers(), {}, []
    read: list[str] = []
    for name, module in model.named_modules():
        layer = next((layer for layer in layers if layer.matches(module)), None)
        if layer is None or any(name.startswith(f"{owner}.") for owner in read):
            continue
        blocks = layer.blocks(name, module)
        seen.update({block.name: Seen(block, layer, module) for block in blocks})
        if not blocks:
            continue
        read.append(name)

        def emit(use: Use, name: str = name) -> None:
            seen[f"{name}.{use.part}" if use.part else name].uses.append(use)

        own = layer.forward(module, emit)
        if own is not None:
            vars(module)["forward"] = own
            undo.append(lambda module=module: vars(module).pop("forward"))
            continue

        def hook(
            module: nn.Module, args: Any, kwargs: Any, output: Any, layer: Layer = layer, emit: Any = emit
        ) -> None:
            for use in layer.uses(module, args, kwargs, output):
                emit(use)

        undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)
    try:
        return call(), seen
    finally:
        for each in undo:
            each()


def passes(
    seen: dict[str, Seen],
    z: Tensor,  # (n, ..., o)
    vectors: Tensor,  # (k, n, ..., o)
) -> dict[str, Tensor]:  # (k, n, R, groups, d_out) a block
    """g of every block for each of the vectors."""
    outputs = [use.output for each in seen.values() for use in each.uses]
    found: dict[str, list[Tensor]] = {name: [] for name in seen}
    for v in vectors:
        gradients = list(
            torch.autograd.grad(z, outputs, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
        for name, each in seen.items():
            mine = [gradients.pop(0) for _ in each.uses]
            found[name].append(each.gradients(mine))
    return {name: torch.stack(each) for name, each in found.items()}


def exact_vectors(likelihood: Likelihood, z: Tensor, valid: Tensor | None) -> Tensor:
    """Columns of the square root of F_R, one case and position at a time, (k, n, ..., o)."""
    z = z.detach()
    flat = z.flatten(0, -2)
    roots = likelihood.fisher_sqrt(flat)  # (k, positions, o)
    found = []
    for i in range(len(flat)):
        if valid is None or bool(valid.flatten()[i]):
            for root in roots:
                one = torch.zeros_like(flat)
                one[i] = root[i]
                found.append(one.view_as(z))
    return torch.stack(found)
