r"""The ``Conv1D`` of the transformers library: y = x W + b with the weight stored (inputs, outputs).

Matched by its name and shape and by what it computes, so that the library need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfac_plugins.layers import HfConv1dConfig
from kfac_plugins.layers._behaviour import computes
from kfac_plugins.layers._maps import OneMap, homogeneous, positions
from kfacore.roles import Block, Use

__all__ = ["HfConv1d"]


class HfConv1d(OneMap):
    """Any module called ``Conv1D`` that computes x W + b."""

    Config: ClassVar[type[HfConv1dConfig]] = HfConv1dConfig
    config: HfConv1dConfig

    def matches(self, module: nn.Module) -> bool:
        """By name, parameters and behaviour on random inputs."""
        own = dict(module.named_parameters())
        weight, bias = own.get("weight"), own.get("bias")
        if type(module).__name__ != "Conv1D" or weight is None or weight.dim() != 2 or not own.keys() <= _NAMES:
            return False
        if bias is not None and bias.shape != weight.shape[1:]:
            return False

        def product(x: Tensor) -> Sequence[Tensor]:
            return [x @ weight if bias is None else torch.addmm(bias, x, weight)]

        return computes(module, weight.shape[0], product)

    def groups(self, module: nn.Module) -> int:
        """One."""
        return 1

    def arrange(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(outputs, inputs)."""
        return weight.T

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """The inputs, position by position."""
        return homogeneous(positions(use.inputs), block.bias)

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """As they are, position by position."""
        return positions(g)


_NAMES = {"weight", "bias"}
