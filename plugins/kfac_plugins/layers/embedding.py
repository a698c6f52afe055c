r"""Embeddings: the row of a unit is one-hot, so token numbers stand for rows and the input side is diagonal.

The block is the weight turned, (width, tokens). The padding row gets no gradient from torch although its forward uses
it, so it must not move: no view shows its column, and a direction that begins with 0 there stays 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from kfac_plugins.layers import EmbeddingConfig
from kfac_plugins.layers._maps import is_unchanged, positions, qualified, trainable
from kfacore.roles import Block, Layer, Side, Use

__all__ = ["Embedding"]


class Embedding(Layer):
    """`torch.nn.Embedding` whose gradient is the derivative: without ``max_norm`` and ``scale_grad_by_freq``."""

    Config: ClassVar[type[EmbeddingConfig]] = EmbeddingConfig
    config: EmbeddingConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own: ``max_norm`` changes weights in the forward, ``scale_grad_by_freq`` the gradient."""
        return (
            is_unchanged(module, nn.Embedding)
            and isinstance(module, nn.Embedding)
            and module.max_norm is None
            and not module.scale_grad_by_freq
        )

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """(width, tokens), diagonal on the side of the tokens."""
        weight = trainable(module, "weight")
        if weight is None:
            return []
        tokens, width = weight.shape
        params = (qualified(name, "weight"),)
        return [Block(name, tokens, width, False, input_side=Side.DIAGONAL, params=params)]

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight turned, without the padding column."""
        return _around(module, tensors["weight"].T)

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """The matrix without the padding column."""
        return _around(module, matrix)

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """Token numbers, (n, R)."""
        return _tokens(use)

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """As they are, position by position."""
        return positions(g) if use.inputs.dim() else g.view(1, 1, -1)

    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        """All but the padding row."""
        padding = _padding(module)
        return None if padding is None else _tokens(use) != padding


def _tokens(use: Use) -> Tensor:
    return use.inputs.reshape(use.inputs.shape[0] if use.inputs.dim() else 1, -1)


def _padding(module: nn.Module) -> int | None:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return module.padding_idx


def _around(
    module: nn.Module,
    matrix: Tensor,  # (width, tokens)
) -> list[Tensor]:
    """The columns before and after the padding's, or all of them."""
    padding = _padding(module)
    parts = [matrix] if padding is None else [matrix[:, :padding], matrix[:, padding + 1 :]]
    return [part for part in parts if part.shape[1]]
