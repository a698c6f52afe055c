r"""Convolutions over one to three dimensions: any stride, dilation, groups and padding.

A unit's row at an output position p is the patch that it sees there,

    abar[c, k] = x[c, p * stride + k * dilation - padding],          c in the unit's group,  k over the kernel,

its columns in the order of the weight, (c_in / groups, \*kernel), with a 1 at the end if there is a bias. Positions are
in row-major order.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfac_plugins.layers import ConvolutionConfig
from kfac_plugins.layers._maps import OneMap, by_groups, is_unchanged
from kfacore.roles import Block, Use

__all__ = ["Convolution", "by_positions", "windows", "with_cases"]

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Convolution(OneMap):
    """`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``."""

    Config: ClassVar[type[ConvolutionConfig]] = ConvolutionConfig
    config: ConvolutionConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own, and subclasses that compute the same."""
        return any(is_unchanged(module, kind, "_conv_forward") for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def groups(self, module: nn.Module) -> int:
        """As the module says."""
        assert isinstance(module, _Conv)
        return module.groups

    def arrange(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(c_out, c_in / groups, *kernel) with the groups of c_out in front."""
        assert isinstance(module, _Conv)
        return torch.unflatten(weight, 0, (module.groups, -1)) if module.groups > 1 else weight

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """The patches, copied once out of a strided view of the padded input."""
        assert isinstance(module, _Conv)
        x = with_cases(use.inputs, len(module.kernel_size))
        margins = [margin for pair in reversed(_margins(module)) for margin in pair]
        if any(margins):
            x = pad(x, margins, mode=_MODES[module.padding_mode])
        return as_rows(windows(x, module.kernel_size, module.stride, module.dilation), block, len(module.kernel_size))

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """Channels last, position by position."""
        assert isinstance(module, _Conv)
        return by_groups(by_positions(with_cases(g, len(module.kernel_size))), block.groups)


def _margins(module: _Conv) -> list[tuple[int, int]]:
    """Cells added before and after each spatial dimension; an odd number for ``same`` has its larger half after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(int(p), int(p)) for p in module.padding]


def with_cases(x: Tensor, dims: int) -> Tensor:
    """(n, c, *spatial), also of the single case that torch takes without its axis."""
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


def by_positions(
    x: Tensor,  # (n, c, *spatial)
) -> Tensor:  # (n, R, c)
    """Channels last, spatial dimensions as one."""
    return x.flatten(2).mT


def windows(
    x: Tensor,  # (n, c, *spatial), padded
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:  # (n, c, *positions, *kernel), a view
    """What the kernel sees at every position."""
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x


def as_rows(
    patches: Tensor,  # (n, groups * c, *positions, *kernel)
    block: Block,
    dims: int,
) -> Tensor:  # (n, R, [groups,] d_in)
    """Rows of every position and group, written once."""
    n, places, kernel = len(patches), patches.shape[2 : 2 + dims], patches.shape[2 + dims :]
    rows = empty_rows(patches, places.numel(), block)
    columns = rows[..., :-1] if block.bias else rows
    target = torch.unflatten(
        torch.unflatten(columns, -1, (-1, *kernel)), 1, places
    )  # (n, *positions, groups, c, *kernel)
    source = torch.unflatten(patches, 1, (block.groups, -1))  # (n, groups, c, *positions, *kernel)
    target.copy_(source.movedim((1, 2), (1 + dims, 2 + dims)))
    return rows if block.groups > 1 else rows.view(n, places.numel(), block.d_in)


def empty_rows(like: Tensor, count: int, block: Block) -> Tensor:
    """Room for ``count`` rows a case, (n, count, groups, d_in), with the 1 of the bias in place."""
    rows = torch.empty(len(like), count, block.groups, block.d_in, dtype=like.dtype, device=like.device)
    if block.bias:
        rows[..., -1].fill_(1.0)  # an assignment would make a tensor of the number first
    return rows
