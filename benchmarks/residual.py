"""Small residual nets in which a block has several neighbours, with data to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["NETS", "ResidualCNN", "ResidualMLP", "SmallGPT", "Task"]

Data = tuple[Tensor, Tensor]


class ResidualMLP(nn.Module):
    """x + down(tanh(up(x))), several times, between an input and an output layer: ten layers in all."""

    def __init__(self, inputs: int, width: int = 24, stages: int = 4, outputs: int = 10) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(stages))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(stages))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 10)."""
        x = self.enter(images.flatten(1)).tanh()
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).tanh())
        z: Tensor = self.leave(x.tanh())
        return z


class ResidualCNN(nn.Module):
    """Residual stages of two 3 x 3 convolutions of one resolution, and a linear layer on their mean."""

    def __init__(self, channels: int = 8, stages: int = 3, outputs: int = 10) -> None:
        super().__init__()

        def convolution(c: int) -> nn.Conv2d:
            return nn.Conv2d(c, channels, 3, padding=1)

        self.enter, self.leave = convolution(1), nn.Linear(channels, outputs)
        self.first = nn.ModuleList(convolution(channels) for _ in range(stages))
        self.second = nn.ModuleList(convolution(channels) for _ in range(stages))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 10)."""
        x = self.enter(images).relu()
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(first(x).relu())
        z: Tensor = self.leave(x.relu().mean((2, 3)))
        return z


class SmallGPT(nn.Module):
    """A character model: causal attention and an MLP a layer, each behind a layer norm."""

    def __init__(self, words: int, width: int = 32, layers: int = 2, context: int = 16) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(words, width), nn.Embedding(context, width)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, t, words)."""
        t = tokens.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.embedding(tokens) + self.positions(torch.arange(t, device=tokens.device))
        for k, attention in enumerate(self.attention):
            a = self.norms[2 * k](x)
            x = x + attention(a, a, a, attn_mask=mask, need_weights=False)[0]
            x = x + self.down[k](nn.functional.gelu(self.up[k](self.norms[2 * k + 1](x))))
        z: Tensor = self.head(self.norms[-1](x))
        return z


@dataclass(frozen=True)
class Task:
    """A net and what it is trained on.

    Attributes:
        build: Makes the net.
        data: Inputs and targets, from a generator where they are generated or sampled.
        batch: Cases of a mini-batch.
        cases: Most cases of the exact model.
    """

    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Data]
    batch: int
    cases: int


def _images(folder: Path | None, generator: torch.Generator, size: int) -> Data:
    """MNIST, or smooth noise that a random net sorts into ten classes; (N, 1, size, size) in [0, 1]."""
    if folder is None:
        noise = torch.rand(4000, 1, size // 2, size // 2, generator=generator)
        x = nn.functional.interpolate(noise, size=size, mode="bilinear")
        teacher = torch.randn(size * size, 10, generator=generator)
        return x, ((x.flatten(1) - 0.5) @ teacher).argmax(1)
    found = np.load(folder / "mnist.npz")
    x = torch.from_numpy(found["x_train"][:10000]).float().unsqueeze(1) / 255.0
    return nn.functional.adaptive_avg_pool2d(x, size), torch.from_numpy(found["y_train"][:10000]).long()


def _text(folder: Path | None, generator: torch.Generator, context: int) -> Data:
    """Pieces of tinyshakespeare, or of a Markov chain; inputs and the next characters, (N, context) each."""
    if folder is None:
        chances = torch.rand(_WORDS, _WORDS, generator=generator) ** 8
        stream = [0]
        for _ in range(40_000):
            stream.append(int(torch.multinomial(chances[stream[-1]], 1, generator=generator)))
        text = torch.tensor(stream)
    else:
        read = (folder / "tinyshakespeare.txt").read_text()[:200_000]
        order = {character: index for index, character in enumerate(sorted(set(read)))}
        text = torch.tensor([order[character] for character in read])
    starts = torch.randint(len(text) - context, (4000,), generator=generator)
    pieces = text[starts[:, None] + torch.arange(context + 1)]
    return pieces[:, :-1], pieces[:, 1:]


_WORDS = 65
"""Characters of tinyshakespeare."""


def _mlp(folder: Path | None) -> Task:
    return Task(lambda: ResidualMLP(14 * 14), lambda generator: _images(folder, generator, 14), 500, 1000)


def _cnn(folder: Path | None) -> Task:
    return Task(ResidualCNN, lambda generator: _images(folder, generator, 14), 250, 400)


def _gpt(folder: Path | None) -> Task:
    return Task(lambda: SmallGPT(_WORDS), lambda generator: _text(folder, generator, 16), 128, 200)


NETS: dict[str, Callable[[Path | None], Task]] = {"residual mlp": _mlp, "residual cnn": _cnn, "gpt": _gpt}
"""By name, given the folder of the data."""
