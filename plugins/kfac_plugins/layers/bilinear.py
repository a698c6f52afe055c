r"""`torch.nn.Bilinear`: y_k = x1^T W_k x2 + b_k. The row of a unit is vec(x1 x2^T), row-major as the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kfac_plugins.layers import BilinearConfig
from kfac_plugins.layers._maps import OneMap, homogeneous, is_unchanged, positions
from kfacore.roles import Block, Use

__all__ = ["Bilinear"]


class Bilinear(OneMap):
    """Linear in the products of two inputs."""

    Config: ClassVar[type[BilinearConfig]] = BilinearConfig
    config: BilinearConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own, and subclasses that compute the same."""
        return is_unchanged(module, nn.Bilinear)

    def groups(self, module: nn.Module) -> int:
        """One."""
        return 1

    def arrange(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(units, inputs of the first, inputs of the second), as it is."""
        return weight

    def uses(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> list[Use]:
        """The first input is kept as the use's input, the second beside it."""
        first, second = [x.detach() for x in (*args, *(kwargs[k] for k in ("input1", "input2") if k in kwargs))]
        return [Use("", first, output, {"second": second})]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """Products of all pairs, position by position."""
        first, second = positions(use.inputs), positions(use.extras["second"])
        return homogeneous((first[..., :, None] * second[..., None, :]).flatten(-2), block.bias)

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """As they are, position by position."""
        return positions(g)
