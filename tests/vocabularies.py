"""Small language models with a vocabulary that is large beside everything else, on generated words."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Kind", "Words", "sentences"]

Kind = Literal["embedding", "tied", "untied"]
KINDS: tuple[Kind, ...] = ("embedding", "tied", "untied")


class Words(nn.Module):
    """An embedding with a residual block, and a head: of two classes, tied, or of its own."""

    def __init__(self, kind: Kind, vocabulary: int = 2000, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pooled = kind == "embedding"
        self.emb = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 2 if self.pooled else vocabulary, bias=kind != "tied")
        nn.init.normal_(self.emb.weight, std=0.5)
        if kind == "tied":
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.down(torch.tanh(self.up(h)))
        z: Tensor = self.head(h.mean(1) if self.pooled else h)
        return z


def sentences(kind: Kind, examples: int, vocabulary: int = 2000, length: int = 4) -> tuple[Tensor, Tensor]:
    """Words of Zipf's frequencies, and what follows each: a fixed successor; or whether word 0 is there."""
    generator = torch.Generator().manual_seed(3)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1)
    x = torch.multinomial(frequencies.expand(examples, -1), length, replacement=True, generator=generator)
    return x, (x == 0).any(1).long() if kind == "embedding" else (7 * x + 1) % vocabulary
