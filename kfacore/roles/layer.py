r"""The role of a layer type: how one kind of module is seen as blocks of parameters with rows and output gradients.

Layers serve curvature only: the gradient and J v belong to parameters and need none. A layer type says which modules it
reads, which blocks they have, and what the rows of a block are. The row of a unit's output is the derivative of that
output by the unit's own weights: a patch for a convolution, one-hot for an embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import DataError
from kfacore.roles.base import Part
from kfacore.roles.block import Block
from kfacore.schema.slots import LayerConfig

__all__ = ["Emit", "Layer", "Use"]


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a block's weights in a forward pass.

    Attributes:
        part: Which of the module's blocks, by the end of its name; empty where it has one.
        inputs: What went in, detached, with the cases in its first dimension as far as the module knows them.
        output: What came out before anything else was done to it: its gradient is g. Attached to the graph.
        extras: Any other tensors that `Layer.rows` and `Layer.counts` need, detached, each with the cases first too
            (statistics of a norm, for example).
    """

    part: str
    inputs: Tensor
    output: Tensor
    extras: Mapping[str, Tensor]

    def first(self, cases: int) -> Use:
        """The same use by the first cases alone; its output stays whole, because it is the graph's.

        Raises:
            DataError: The layer was given a sparse tensor, which has no rows to take.
        """
        if self.inputs.layout is not torch.strided:
            raise DataError(
                "inputs: a layer got a sparse tensor, of which curvature takes no rows; make it dense with .to_dense()"
            )
        return replace(self, inputs=self.inputs[:cases], extras={k: v[:cases] for k, v in self.extras.items()})


Emit = Callable[[Use], None]
"""Tells the network of a use."""


class Layer(Part):
    """Reads one kind of module."""

    config: LayerConfig

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this type reads the module. A subclass with a forward of its own is another kind of module."""

    @abstractmethod
    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """The module's blocks; only trainable parameters count, a frozen bias is a constant.

        Args:
            name: The module's qualified name; a block's name is it, or it and a part: ``f"{name}.{part}"``.
            module: The module.

        Returns:
            At least one; none if what is trainable in it cannot be read (it is then `diagonal`).
        """

    @abstractmethod
    def view(
        self,
        block: Block,
        module: nn.Module,
        tensors: Mapping[str, Tensor],  # in the shapes of the module's parameters, by local name
    ) -> list[Tensor]:
        """Views of parameter-shaped tensors in the shapes of `split`, so that one can be added to the other."""

    @abstractmethod
    def split(
        self,
        block: Block,
        module: nn.Module,
        matrix: Tensor,  # ([groups,] d_out, d_in)
    ) -> list[Tensor]:
        """Views of the block's matrix, aligned with `view`."""

    @abstractmethod
    def rows(
        self,
        block: Block,
        module: nn.Module,
        use: Use,
    ) -> Tensor:  # (n, R, [groups,] d_in), or token numbers (n, R)
        """abar of one use, with the homogeneous 1 last if the block has a bias.

        Every case by itself, so that a use can be cut with `Use.first`. For a ``full`` block whatever its `gradients`
        are made of: nobody else asks.
        """

    @abstractmethod
    def gradients(
        self,
        block: Block,
        module: nn.Module,
        use: Use,
        g: Tensor,  # the derivative by `Use.output`
    ) -> Tensor:  # (n, R, [groups,] d_out)
        """g of every row; for a ``full`` block the gradient of every case, (n, [groups,] d_in).

        The sum over all uses and counted rows of g abar^T is the gradient by the block's matrix.
        """

    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        """Which rows count, (n, R) bool, if not all: the padding row of an embedding does not."""
        return None

    def uses(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> list[Use]:
        """The uses of one call of the module, from its arguments and its output; one by default."""
        x = args[0] if args else next(iter(kwargs.values()))
        return [Use("", x.detach(), output, {})]

    def forward(self, module: nn.Module, emit: Emit) -> Callable[..., Any] | None:
        """A forward equal to the module's own that tells of its uses, for modules whose inside is not seen by hooks.

        Recurrent nets, attention. None, the default, keeps the module's own; `uses` is then asked. It reads parameters
        by their names at every call, since others may stand in for them (`torch.func.functional_call`), has forward
        mode, and draws what the module's own draws.
        """
        return None
