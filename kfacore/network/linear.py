"""The rule of `torch.nn.Linear` with one row a case: s = W a + b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from kfacore.errors import DataError, UnsupportedModelError
from kfacore.network.rules import LayerRule
from kfacore.roles.block import Block

__all__ = ["LinearRule"]


class LinearRule(LayerRule):
    """Linear layers, with or without bias; V = [W b], abar = [a; 1].

    A bias that is frozen, or absent, is a constant: the block is W alone.
    """

    def matches(self, module: nn.Module) -> bool:
        """Linear and subclasses that keep its forward."""
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def info(self, name: str, module: nn.Module) -> Block:
        """d_in counts the bias only if it is trainable."""
        trainable = {key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}
        if "weight" not in trainable or not trainable <= {"weight", "bias"}:
            raise UnsupportedModelError(
                f"{name}: {type(module).__name__} must have a plain trainable weight, found trainable "
                f"{', '.join(sorted(trainable))}; remove reparameterisations, or freeze the whole layer"
            )
        linear = cast("nn.Linear", module)
        bias = "bias" in trainable
        return Block(name, linear.in_features + bias, linear.out_features, bias)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """[weight] or [weight, bias]."""
        return [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]

    def split(self, info: Block, block: Tensor) -> list[Tensor]:
        """All columns, or all but the last and the last."""
        return [block[:, :-1], block[:, -1]] if info.bias else [block]

    def check_input(self, info: Block, module: nn.Module, x: Any) -> None:
        """One row a case, as wide as the weights and in their dtype."""
        if not isinstance(x, Tensor) or x.dim() != 2:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UnsupportedModelError(
                f"{info.name}: Linear must get inputs of shape (cases, features), found {found}; layers that share "
                "weights over positions are not supported"
            )
        weight = cast("nn.Linear", module).weight
        if x.shape[1] != weight.shape[1]:
            raise DataError(
                f"{info.name}: Linear takes {weight.shape[1]} features, found inputs of shape {tuple(x.shape)}; check "
                "the width of the data against the model"
            )
        if (x.dtype, x.device) != (weight.dtype, weight.device):
            raise DataError(
                f"{info.name}: Linear has weights in {_place(weight)}, found inputs in {_place(x)}; convert the data "
                "or the model, for example with .to()"
            )

    def inputs(self, info: Block, x: Tensor) -> Tensor:
        """[a; 1]."""
        x = x.detach()
        return nn.functional.pad(x, (0, 1), value=1.0) if info.bias else x

    def gradient(self, rows: Tensor, g: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """g^T abar straight into the block; in mixed precision the product is formed in the dtype of the pass."""
        if g.dtype == out.dtype:
            out.addmm_(g.T, rows, beta=1.0 if accumulate else 0.0)
        else:
            product = g.T @ rows
            out.add_(product) if accumulate else out.copy_(product)

    def primal(self, module: nn.Module, x: Tensor) -> Tensor:
        """W a + b."""
        linear = cast("nn.Linear", module)
        return nn.functional.linear(x, linear.weight, linear.bias)

    def tangent(self, module: nn.Module, rows: Tensor, dx: Tensor | None, directions: Sequence[Tensor]) -> Tensor:
        """All directions' incoming tangents in one product with W, then one product a direction."""
        weight = cast("nn.Linear", module).weight.detach()
        n = rows.shape[0]
        result = rows.new_empty(len(directions) * n, weight.shape[0]) if dx is None else dx @ weight.T
        for index, block in enumerate(directions):
            result[index * n : (index + 1) * n].addmm_(rows, block.T, beta=0.0 if dx is None else 1.0)
        return result


def _place(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
