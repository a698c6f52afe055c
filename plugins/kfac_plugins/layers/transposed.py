r"""Transposed convolutions over one to three dimensions: any stride, dilation, groups and output padding.

A unit's row at an output position p is what its weights meet there: with the input spread out by the stride, zeros
between,

    abar[c, k] = x[c, q]  where  p = q * stride - padding + k * dilation,  else 0,      c in the unit's group.

Columns are in the order (c_in / groups, \*kernel), with a 1 at the end if there is a bias. The weight has the input
channels first, (c_in, c_out / groups, \*kernel): the block's view turns them.
"""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfac_plugins.layers import TransposedConfig
from kfac_plugins.layers._maps import OneMap, by_groups, is_unchanged
from kfac_plugins.layers.convolution import by_positions, empty_rows, with_cases
from kfacore.roles import Block, Use

__all__ = ["Transposed"]

_ConvT = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Transposed(OneMap):
    """`torch.nn.ConvTranspose1d`, ``ConvTranspose2d`` and ``ConvTranspose3d``."""

    Config: ClassVar[type[TransposedConfig]] = TransposedConfig
    config: TransposedConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own, and subclasses that compute the same."""
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return any(is_unchanged(module, kind, "_output_padding") for kind in kinds)

    def groups(self, module: nn.Module) -> int:
        """As the module says."""
        assert isinstance(module, _ConvT)
        return module.groups

    def arrange(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Output channels before input channels, with the groups in front."""
        assert isinstance(module, _ConvT)
        return (
            torch.unflatten(weight, 0, (module.groups, -1)).transpose(1, 2)
            if module.groups > 1
            else weight.transpose(0, 1)
        )

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """One offset of the kernel after the other: each is a shifted window of the input spread out by the stride."""
        assert isinstance(module, _ConvT)
        dims = len(module.kernel_size)
        # Taken from what came out: the caller may have asked for a size, so output_padding alone does not tell it.
        places = use.output.shape[-dims:]
        x = _spread(with_cases(use.inputs, dims), module, tuple(places))
        rows = empty_rows(x, places.numel(), block)
        columns = rows[..., :-1] if block.bias else rows
        target = torch.unflatten(torch.unflatten(columns, -1, (-1, *module.kernel_size)), 1, places)
        source = torch.unflatten(x, 1, (block.groups, -1)).movedim((1, 2), (-2, -1))  # (n, *padded, groups, c)
        for k in product(*map(range, module.kernel_size)):
            window = source
            for dim, (offset, size) in enumerate(zip(k, places, strict=True)):
                start = (module.kernel_size[dim] - 1 - offset) * module.dilation[dim]
                window = window.narrow(dim + 1, start, size)
            place: tuple[Any, ...] = (..., *k)
            target[place] = window
        return rows if block.groups > 1 else rows[:, :, 0]

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """Channels last, position by position."""
        assert isinstance(module, _ConvT)
        return by_groups(by_positions(with_cases(g, len(module.kernel_size))), block.groups)


def _spread(x: Tensor, module: _ConvT, places: tuple[int, ...]) -> Tensor:
    """The input with stride - 1 zeros between its cells and margins as wide as the kernel reaches.

    Cell p + (kernel - 1 - k) * dilation of it is what the output at p takes by the kernel's k.
    """
    dims = len(places)
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], module.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    cells: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
    wide[cells] = x
    margins: list[int] = []
    for dim in reversed(range(dims)):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1)
        before = reach - int(module.padding[dim])
        margins += [before, places[dim] + reach - before - sizes[dim]]  # negative ones cut
    return pad(wide, margins)
