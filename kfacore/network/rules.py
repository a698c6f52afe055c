"""How a kind of module is read as a layer with a weight block; one rule a kind.

A new kind of layer is one new file with a `LayerRule` and its line in `_rules`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.roles.block import Block

__all__ = ["Layer", "LayerRule", "find_layers"]


class LayerRule(ABC):
    """Reads one kind of module: its block, its inputs and gradients as rows, and its tangent.

    The block V has shape (d_out, d_in); the last column is the bias if there is one.
    """

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this rule reads the module."""

    @abstractmethod
    def info(self, name: str, module: nn.Module) -> Block:
        """The layer's facts.

        Raises:
            UnsupportedModelError: The module is of this kind but cannot be read; the message names it.
        """

    @abstractmethod
    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters of the block, in the order of `split`."""

    @abstractmethod
    def split(
        self,
        info: Block,
        block: Tensor,  # (d_out, d_in)
    ) -> list[Tensor]:
        """Views of the block in the shapes of `parameters`."""

    @abstractmethod
    def check_input(self, info: Block, module: nn.Module, x: Any) -> None:
        """Refuse what the module is about to be called with if it cannot work or this rule cannot read it.

        Raises:
            UnsupportedModelError: Its shape cannot be read; the message names the module.
            DataError: It does not fit the module's weights.
        """

    @abstractmethod
    def inputs(
        self,
        info: Block,
        x: Tensor,
    ) -> Tensor:  # (n, d_in)
        """abar: the input rows with the homogeneous 1 appended if there is a bias."""

    @abstractmethod
    def gradient(
        self,
        rows: Tensor,  # abar, as `inputs` gives it, in the dtype of g
        g: Tensor,  # derivative by the module's output; in mixed precision not in the dtype of out
        out: Tensor,  # (d_out, d_in)
        *,
        accumulate: bool,
    ) -> None:
        """Write (or add) the derivative by the block, sum over cases of g abar^T, into ``out``."""

    @abstractmethod
    def primal(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module's output."""

    @abstractmethod
    def tangent(
        self,
        module: nn.Module,
        rows: Tensor,  # abar of one copy of the cases, as `inputs` gives it
        dx: Tensor | None,  # its tangents, one copy a direction, (k n, ...); None if it does not move
        directions: Sequence[Tensor],  # k blocks (d_out, d_in)
    ) -> Tensor:  # (k n, ...)
        """The output's tangents W dx + dV abar, one copy of the cases a direction."""


@dataclass(frozen=True)
class Layer:
    """A module together with the rule that reads it."""

    info: Block
    module: nn.Module
    rule: LayerRule

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, aligned with `split`."""
        return self.rule.parameters(self.module)

    def split(self, block: Tensor) -> list[Tensor]:
        """Views of a block (d_out, d_in) in the shapes of `parameters`."""
        return self.rule.split(self.info, block)


def _rules() -> tuple[LayerRule, ...]:
    """Every known rule; the first that matches a module reads it."""
    from kfacore.network.linear import LinearRule

    return (LinearRule(),)


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers that hold the model's trainable parameters, in order of registration.

    Args:
        model: Any module; parameters with ``requires_grad=False`` are constants.

    Returns:
        One layer for each module with trainable parameters.

    Raises:
        UnsupportedModelError: A trainable parameter lies in a module that no rule reads, or is shared by two modules,
            or nothing is trainable; the message names the module.
    """
    rules = _rules()
    layers: list[Layer] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        trainable = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if not trainable:
            continue
        shown = name or "(the model itself)"
        rule = next((rule for rule in rules if rule.matches(module)), None)
        if rule is None:
            raise UnsupportedModelError(
                f"{shown}: {type(module).__name__} has trainable parameters ({', '.join(trainable)}) that cannot be "
                "preconditioned; supported: Linear. Use a supported layer or freeze it with requires_grad_(False)"
            )
        layer = Layer(rule.info(shown, module), module, rule)
        for parameter in layer.parameters:
            other = owners.setdefault(id(parameter), shown)
            if other != shown:
                raise UnsupportedModelError(
                    f"{shown}: shares a trainable parameter with {other}; tied weights cannot be preconditioned. "
                    "Give each module its own parameter"
                )
        layers.append(layer)
    if not layers:
        raise UnsupportedModelError("the model has no trainable parameters; nothing to optimize")
    for layer in layers:
        for parameter in layer.parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UnsupportedModelError(
                    f"{layer.info.name}: its parameters are {str(parameter.dtype).removeprefix('torch.')}, in which "
                    "factors cannot be inverted; use float32 or float64"
                )
    places = {(parameter.device, parameter.dtype) for layer in layers for parameter in layer.parameters}
    if len(places) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in places))
        raise UnsupportedModelError(f"the trainable parameters must share one device and dtype; found {found}")
    return layers
