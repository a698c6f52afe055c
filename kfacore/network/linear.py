"""The fast path: `torch.nn.Linear` called once with one row a case, s = W a + b.

Its products go straight into its block V = [W b], abar = [a; 1], and for J v its outputs are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from kfacore.errors import DataError, UnsupportedModelError
from kfacore.roles.block import Block

__all__ = [
    "add_gradient",
    "check_fit",
    "check_rows",
    "homogeneous",
    "is_linear",
    "primal",
    "split_block",
    "strict_block",
    "tangent",
    "trainable_of",
]


def is_linear(module: nn.Module) -> bool:
    """Linear and subclasses that keep its forward."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def trainable_of(module: nn.Module) -> set[str]:
    """Local names of a module's own trainable parameters."""
    return {key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}


def strict_block(name: str, module: nn.Module) -> Block:
    """The block of a linear module; d_in counts the bias only if it is trainable.

    Raises:
        UnsupportedModelError: Its weight is frozen or computed from others.
    """
    trainable = trainable_of(module)
    if "weight" not in trainable or not trainable <= {"weight", "bias"}:
        raise UnsupportedModelError(
            f"{name}: {type(module).__name__} must have a plain trainable weight, found trainable "
            f"{', '.join(sorted(trainable))}; remove reparameterisations, or freeze the whole layer"
        )
    linear = cast("nn.Linear", module)
    bias = "bias" in trainable
    return Block(name, linear.in_features + bias, linear.out_features, bias)


def split_block(block: Block, matrix: Tensor) -> list[Tensor]:
    """Views of V in the shapes of [W] or [W, b]: all columns, or all but the last and the last."""
    return [matrix[:, :-1], matrix[:, -1]] if block.bias else [matrix]


def check_rows(name: str, x: Any) -> None:
    """One row a case, for the strict path.

    Raises:
        UnsupportedModelError: The inputs have another shape; the message names the module.
    """
    if not isinstance(x, Tensor) or x.dim() != 2:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UnsupportedModelError(
            f"{name}: Linear must get inputs of shape (examples, features), found {found}; layers that share "
            "weights over positions are not supported"
        )


def check_fit(name: str, module: nn.Module, x: Any) -> None:
    """As wide as the weights and in their dtype, where they are.

    Raises:
        DataError: The inputs do not fit the module's weights; the message names it.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dim() == 0:
        return
    if x.shape[-1] != weight.shape[1]:
        raise DataError(
            f"{name}: Linear takes {weight.shape[1]} features, found inputs of shape {tuple(x.shape)}; check "
            "the width of the data against the model"
        )
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        raise DataError(
            f"{name}: Linear has weights in {_place(weight)}, found inputs in {_place(x)}; convert the data "
            "or the model, for example with .to()"
        )


def homogeneous(block: Block, x: Tensor) -> Tensor:  # (n, d_in)
    """[a; 1]."""
    x = x.detach()
    return nn.functional.pad(x, (0, 1), value=1.0) if block.bias else x


def add_gradient(
    rows: Tensor,  # abar, in the dtype of g
    g: Tensor,  # derivative by the module's output; in mixed precision not in the dtype of out
    out: Tensor,  # (d_out, d_in)
    *,
    accumulate: bool,
) -> None:
    """g^T abar straight into the block; in mixed precision the product is formed in the dtype of the pass."""
    if g.dtype == out.dtype:
        out.addmm_(g.T, rows, beta=1.0 if accumulate else 0.0)
    else:
        product = g.T @ rows
        out.add_(product) if accumulate else out.copy_(product)


def primal(module: nn.Module, x: Tensor) -> Tensor:
    """W a + b."""
    linear = cast("nn.Linear", module)
    return nn.functional.linear(x, linear.weight, linear.bias)


def tangent(
    module: nn.Module,
    rows: Tensor,  # abar of one copy of the cases
    dx: Tensor | None,  # its tangents, one copy a direction, (k n, ...); None if it does not move
    directions: Sequence[Tensor],  # k blocks (d_out, d_in)
) -> Tensor:  # (k n, d_out)
    """W dx + dV abar: all directions' incoming tangents in one product with W, then one product a direction."""
    weight = cast("nn.Linear", module).weight.detach()
    n = rows.shape[0]
    result = rows.new_empty(len(directions) * n, weight.shape[0]) if dx is None else dx @ weight.T
    for index, block in enumerate(directions):
        result[index * n : (index + 1) * n].addmm_(rows, block.T, beta=0.0 if dx is None else 1.0)
    return result


def _place(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
