"""A block together with the modules that use it: its matrix, aligned with views of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.network import linear
from kfacore.roles.block import Block
from kfacore.roles.layer import Layer

__all__ = ["ModelBlock", "Of", "User", "check_parameters", "diagonal_block", "with_diagonals"]

Of = Callable[[nn.Parameter], Tensor]
"""What stands for a parameter: itself, its gradient, its part of a direction."""


@dataclass(frozen=True)
class User:
    """A module that uses a block's weights, and how its type reads them.

    Attributes:
        name: The module's qualified name.
        module: The module.
        type: Its layer type; None for a Linear that only the fast path reads.
        block: The block as this module's type sees it.
        part: Which of the module's blocks; empty where it has one.
        local: The module's parameters that the block lies in, by local name.
    """

    name: str
    module: nn.Module
    type: Layer | None
    block: Block
    part: str
    local: tuple[tuple[str, nn.Parameter], ...] = ()

    def view(self, of: Of) -> list[Tensor]:
        """The block's share of what stands for the module's parameters."""
        local = {key: of(parameter) for key, parameter in self.local}
        if self.type is None:
            return [local["weight"], local["bias"]] if self.block.bias else [local["weight"]]
        return self.type.view(self.block, self.module, local)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Views of the block's matrix, aligned with `view`."""
        if self.type is None:
            return linear.split_block(self.block, matrix)
        return self.type.split(self.block, self.module, matrix)


@dataclass(frozen=True)
class ModelBlock:
    """A block together with the modules that use it.

    Attributes:
        info: The block.
        parameters: The parameters that it lies in.
        users: The modules that use it, several where they share weights; none for a `diagonal` block. The embeddings of
            a `tied` block come first, its heads last.
        fast: Whether its products may go straight into it: a plain Linear with weights of its own.
        heads: How many of the users are heads of a `tied` block.
    """

    info: Block
    parameters: tuple[nn.Parameter, ...]
    users: tuple[User, ...] = ()
    fast: bool = False
    heads: int = 0

    @property
    def module(self) -> nn.Module:
        """The first module that uses it."""
        return self.users[0].module

    def view(self, of: Of) -> list[Tensor]:
        """The block's share of what stands for the parameters, in the shapes of `split`."""
        return self.users[-1].view(of) if self.users else [of(self.parameters[0])]

    def views(self) -> list[Tensor]:
        """Views of the parameters without their graph, aligned with `split`."""
        if self.fast:
            return [parameter.detach() for parameter in self.parameters]
        return self.view(lambda parameter: parameter.detach())

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Views of the block's matrix, aligned with `view`."""
        if self.users:
            return self.users[-1].split(matrix)
        return [matrix[0].view(self.parameters[0].shape)]


def diagonal_block(name: str, parameter: nn.Parameter, why: str) -> ModelBlock:
    """A parameter whose curvature is its Fisher's diagonal."""
    info = Block(name, parameter.numel(), 1, False, kind="diagonal", params=(name,), why=why)
    return ModelBlock(info, (parameter,))


def check_parameters(blocks: Sequence[ModelBlock]) -> None:
    """One device, and float32 or float64, in which factors can be inverted.

    Raises:
        UnsupportedModelError: The message names what was found.
    """
    if not blocks:
        raise UnsupportedModelError("the model has no trainable parameters; nothing to optimize")
    for block in blocks:
        for parameter in block.parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UnsupportedModelError(
                    f"{block.info.name}: its parameters are {str(parameter.dtype).removeprefix('torch.')}, in which "
                    "factors cannot be inverted; use float32 or float64"
                )
    places = {(parameter.device, parameter.dtype) for block in blocks for parameter in block.parameters}
    if len(places) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in places))
        raise UnsupportedModelError(f"the trainable parameters must share one device and dtype; found {found}")


def with_diagonals(
    blocks: Iterable[ModelBlock], chosen: Mapping[int, str], names: Mapping[nn.Parameter, str]
) -> list[ModelBlock]:
    """The blocks, those at the chosen positions taken apart into `diagonal` ones, for the reasons given."""
    kept = list(blocks)
    broken = {id(parameter): why for index, why in chosen.items() for parameter in kept[index].parameters}
    found: list[ModelBlock] = []
    done: set[int] = set()
    for block in kept:
        if not any(id(parameter) in broken for parameter in block.parameters):
            found.append(block)
            continue
        for parameter in block.parameters:
            if id(parameter) not in done:
                done.add(id(parameter))
                reason = next(broken[id(each)] for each in block.parameters if id(each) in broken)
                found.append(diagonal_block(names[parameter], parameter, reason))
    return found
