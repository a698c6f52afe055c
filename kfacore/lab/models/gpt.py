"""A small transformer that predicts the next token: pre-norm blocks, learned positions.

Sources: Vaswani et al., "Attention is all you need", 2017; Radford et al., "Language models are unsupervised multitask
learners", 2019 (norms in front of each branch and one at the end). Queries, keys and values have a layer each, so that
K-FAC sees three blocks of the model's width in place of one three times as wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kfacore.errors import ConfigError
from kfacore.lab.models.initial import normal_init

__all__ = ["GPT", "Attention", "Branches"]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d / h)) V in each of h heads, and a linear layer over all of them.

    Args:
        width: d.
        heads: h, which must divide d.
        causal: Whether a position sees only itself and those before it.

    Raises:
        ConfigError: The heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"a width of {width} cannot be shared by {heads} heads; choose a multiple of {heads}")
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (n, t, d) -> (n, t, d)
        """Mix the positions."""
        n, t, d = x.shape
        q, k, v = (
            layer(x).view(n, t, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return out


class Branches(nn.Module):
    """One block of a transformer: x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        width: d; the hidden layer of the feed-forward branch has 4 d units.
        heads: Heads of the attention.
        dropout: Share of each branch's outputs that is dropped.
        causal: See `Attention`.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.unit = nn.GELU()
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    @property
    def ends(self) -> Sequence[nn.Linear]:
        """The layers that end the two branches."""
        return self.attention.out, self.narrow

    def forward(self, x: Tensor) -> Tensor:  # (n, t, d) -> (n, t, d)
        """Add what the two branches find."""
        x = x + self.drop1(self.attention(self.norm1(x)))
        out: Tensor = x + self.drop2(self.narrow(self.unit(self.wide(self.norm2(x)))))
        return out


class GPT(nn.Module):
    """Natural parameters of the next token at each position of a piece of text.

    Args:
        tokens: Size of the vocabulary, v.
        context: Longest piece, T.
        layers: Blocks, L.
        width: d.
        heads: Heads of each block.
        dropout: Share that is dropped of the embedding and of each branch.
        tied: Whether the head's weight is the embedding's.
        generator: A CPU generator, the source of all parameters.

    Raises:
        ConfigError: The heads do not divide the width.
    """

    def __init__(
        self,
        tokens: int,
        context: int,
        *,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        tied: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Branches(width, heads, dropout, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=not tied)
        ends = [layer for block in self.blocks if isinstance(block, Branches) for layer in block.ends]
        normal_init(self, generator, smaller=ends)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:  # (n, t) integers -> (n, t, v)
        """One vector of v numbers a position, t at most T."""
        n, t = ids.shape
        positions = torch.arange(t, device=ids.device).expand(n, t)  # a row of each case, as all other inputs
        x = self.drop(self.embedding(ids) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        z: Tensor = self.head(self.norm(x))
        return z
