r"""`torch.nn.Linear` over any number of positions: s = W a + b, every input a row.

The derivative of the output s_r by V = [W b] is abar_r = [a_r; 1] (Martens & Grosse 2015, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfac_plugins.layers import LinearConfig
from kfacore.roles.block import Block
from kfacore.roles.layer import Layer, Use

__all__ = ["LinearLayer"]


class LinearLayer(Layer):
    """Linear layers, with or without bias. A bias that is frozen, or absent, is a constant: the block is W alone."""

    Config = LinearConfig
    config: LinearConfig

    def matches(self, module: nn.Module) -> bool:
        """Linear and subclasses that keep its forward, but for the one in attention, which torch never calls."""
        own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return own and not isinstance(module, NonDynamicallyQuantizableLinear)

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """One block; none if the weight is frozen or computed from others, as by a parametrisation."""
        trainable = {key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}
        if "weight" not in trainable:
            return []
        linear = cast("nn.Linear", module)
        bias = "bias" in trainable
        params = tuple(f"{name}.{key}" if name else key for key in ("weight", "bias")[: 1 + bias])
        return [Block(name, linear.in_features + bias, linear.out_features, bias, params=params)]

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """[W] or [W, b]."""
        return [tensors["weight"], tensors["bias"]] if block.bias else [tensors["weight"]]

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """All columns, or all but the last and the last."""
        return [matrix[:, :-1], matrix[:, -1]] if block.bias else [matrix]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """[a; 1] of every position."""
        x = _positions(use.inputs)
        return nn.functional.pad(x, (0, 1), value=1.0) if block.bias else x

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """g of every position."""
        return _positions(g)


def _positions(x: Tensor) -> Tensor:  # (n, ..., d) -> (n, R, d)
    """All dimensions between the first and the last as one."""
    if x.dim() < 3:
        return x.reshape(-1, 1, x.shape[-1])
    return x.flatten(1, -2)
