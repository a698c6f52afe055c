r"""`torch.nn.EmbeddingBag`: an embedding whose rows of a bag are summed, averaged, or reduced to their maximum.

Its fused kernel has neither forward mode nor second derivatives, and no hook sees the rows. `EmbeddingBag.forward`
looks tokens up and then reduces: the block is that of an embedding, its rows the tokens of a bag, one bag a case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from kfac_plugins.layers import EmbeddingBagConfig
from kfac_plugins.layers._maps import is_unchanged, positions
from kfac_plugins.layers.embedding import Embedding
from kfacore.roles import Block, Use
from kfacore.roles.layer import Emit

__all__ = ["EmbeddingBag"]


class EmbeddingBag(Embedding):
    """All modes, 2-d inputs and 1-d inputs with offsets, weights of samples, padding."""

    Config: ClassVar[type[EmbeddingBagConfig]] = EmbeddingBagConfig  # type: ignore[assignment]  # another component
    config: EmbeddingBagConfig  # type: ignore[assignment]

    def matches(self, module: nn.Module) -> bool:
        """Torch's own: ``max_norm`` changes weights in the forward, ``scale_grad_by_freq`` the gradient."""
        return (
            is_unchanged(module, nn.EmbeddingBag)
            and isinstance(module, nn.EmbeddingBag)
            and module.max_norm is None
            and not module.scale_grad_by_freq
        )

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """As they are, token by token."""
        return positions(g)

    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        """Tokens that are in a bag, and no padding."""
        return use.extras["counts"]

    def forward(self, module: nn.Module, emit: Emit) -> Callable[..., Any]:
        """Look up, tell, reduce."""
        assert isinstance(module, nn.EmbeddingBag)
        return partial(_reduced, module, emit)


def _reduced(
    module: nn.EmbeddingBag,
    emit: Emit,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """As `torch.nn.EmbeddingBag.forward`."""
    if input.dim() == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        index, inside = _places(module, len(input), offsets)
        tokens = input[index] if len(input) else index
        weights = None if per_sample_weights is None else per_sample_weights[index]
    else:
        tokens, inside, weights = input, torch.ones_like(input, dtype=torch.bool), per_sample_weights
    if module.padding_idx is not None:
        inside = inside & (tokens != module.padding_idx)
    tokens = torch.where(inside, tokens, 0)
    rows = embedding(tokens, module.weight)  # (n, R, d)
    emit(Use("", tokens.detach(), rows, {"counts": inside}))
    if module.mode == "max":
        if rows.shape[1] == 0:
            return rows.sum(1)
        largest = rows.masked_fill(~inside[..., None], -torch.inf).max(1).values
        return torch.where(inside.any(1, keepdim=True), largest, 0.0)
    shares = inside.to(rows.dtype) if weights is None else torch.where(inside, weights, 0.0)
    if module.mode == "mean":
        shares = shares / inside.sum(1, keepdim=True).clamp_min(1)
    return (rows * shares[..., None]).sum(1)


def _places(
    module: nn.EmbeddingBag,
    tokens: int,
    offsets: Tensor,  # (n,), or with the end of the last (n + 1,)
) -> tuple[Tensor, Tensor]:  # (n, R) twice
    """Where each bag's tokens are among all of them, and which of these places are a bag's own."""
    starts, ends = offsets, torch.cat([offsets[1:], offsets.new_full((1,), tokens)])
    if module.include_last_offset:
        starts, ends = offsets[:-1], offsets[1:]
    lengths = ends - starts
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=offsets.device)
    inside = steps < lengths[:, None]
    return torch.where(inside, starts[:, None] + steps, 0), inside
