"""Training loops that belong to somebody else: a tuned optimizer of torch's with its schedule, and a guest around it.

A character GPT of 3 blocks of width 128 with AdamW, and a CNN on small images with SGD and momentum; both with one
cycle of the learning rate, up for a tenth of the steps, then down along a cosine.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfacore import Preconditioned
from kfacore.lab.models import IMAGE_MODELS
from kfacore.lab.models.gpt import GPT

__all__ = ["Loop", "cnn", "gpt", "loss_of", "run_pass"]

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loop:
    """What is trained, and how it is without a guest.

    Attributes:
        name: Of the task.
        build: A model, by seed.
        batch: A mini-batch of the training data, (n, ...) inputs and classes of all positions.
        held: Mini-batches that are not trained on.
        optimizer: The base, given parameters and the largest learning rate.
        rates: Largest learning rates to tune among.
        rate: The one that is taken where nobody tunes; `python -m benchmarks graft --tune` finds the best.
        steps: Length of the schedule.
    """

    name: str
    build: Callable[[int], nn.Module]
    batch: Batches
    held: tuple[tuple[Tensor, Tensor], ...]
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    rates: tuple[float, ...]
    rate: float
    steps: int

    def with_steps(self, steps: int | None) -> Loop:
        """The same, with a schedule of another length."""
        return self if steps is None else replace(self, steps=steps)

    def schedule(self, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.lr_scheduler.LRScheduler:
        """One cycle of the learning rate."""
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=self.steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def held_loss(self, model: nn.Module) -> float:
        """Mean loss of the held-out positions, with the model in evaluation mode."""
        model.eval()
        with torch.no_grad():
            sums = [float(loss_of(model(x), y)) * y.numel() for x, y in self.held]
        model.train()
        return sum(sums) / sum(y.numel() for _, y in self.held)


def loss_of(z: Tensor, y: Tensor) -> Tensor:
    """Mean over all positions."""
    return nn.functional.cross_entropy(z.flatten(0, -2), y.flatten())


def run_pass(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Forward and backward pass of one mini-batch as a user writes it, watched by a guest; the loss."""
    guest = optimizer if isinstance(optimizer, Preconditioned) else None
    with nullcontext() if guest is None else guest.watch():
        z = model(x)
        if guest is not None:
            guest.observe(z)
    loss = loss_of(z, y)
    loss.backward()
    return loss.detach()


def gpt(
    file: Path | None, *, batch: int = 32, context: int = 128, width: int = 128, steps: int = 200, held: int = 4
) -> Loop:
    """The character GPT, on a text file or on words made up."""
    text = made_up() if file is None else file.read_text("utf-8")
    order = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([order[character] for character in text])
    cut = len(ids) * 9 // 10
    window = torch.arange(context + 1)

    def build(seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return GPT(len(order), context, layers=3, width=width, heads=4, dropout=0.0, tied=False, generator=generator)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pieces = ids[torch.randint(cut - context, (batch, 1), generator=generator) + window]
        return pieces[:, :-1], pieces[:, 1:]

    starts = torch.linspace(cut, len(ids) - context - 1, held * batch).long()
    kept = ids[starts[:, None] + window].split(batch)
    pairs = tuple((pieces[:, :-1], pieces[:, 1:]) for pieces in kept)

    def adamw(parameters: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.1)

    return Loop("gpt", build, draw, pairs, adamw, (1e-3, 2e-3, 4e-3, 8e-3), 4e-3, steps)


def cnn(file: Path | None, *, batch: int = 64, width: int = 16, steps: int = 300) -> Loop:
    """The CNN, on an .npz of images with ``x_train``, ``y_train``, ``x_test``, ``y_test``, or on noise made up."""
    x, y, x_held, y_held = pictures() if file is None else images(file)
    shape, classes = (x.shape[1], x.shape[2], x.shape[3]), int(y.max()) + 1

    def build(seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return IMAGE_MODELS["cnn"](shape, classes, width=width, depth=2, generator=generator)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (batch,), generator=generator)
        flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        part = x[chosen]
        moves = torch.randint(-3, 4, (2,), generator=generator).tolist()
        return torch.where(flipped, part.flip(3), part).roll(moves, (2, 3)), y[chosen]

    def sgd(parameters: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)

    pairs = tuple(zip(x_held.split(250), y_held.split(250), strict=True))
    return Loop("cnn", build, draw, pairs, sgd, (0.01, 0.02, 0.04, 0.08, 0.16), 0.04, steps)


def made_up(words: int = 20_000) -> str:
    """Text of eighteen words that follow each other by a rule with four choices."""
    generator = torch.Generator().manual_seed(0)
    letters, follow = (torch.randint(0, 18, (18, k), generator=generator).tolist() for k in (3, 4))
    turns: Iterator[int] = iter(torch.randint(0, 4, (words,), generator=generator).tolist())
    chosen = itertools.accumulate(turns, lambda word, turn: int(follow[word][turn]), initial=0)
    return " ".join("".join(string.ascii_lowercase[letter] for letter in letters[word]) for word in chosen)


def images(file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as float32 with mean 0 and deviation 1 of the training part, and classes."""
    found = np.load(file)
    x, x_held = (torch.from_numpy(found[name]).float() for name in ("x_train", "x_test"))
    mean, deviation = x.mean(), x.std()
    y, y_held = (torch.from_numpy(found[name]).long() for name in ("y_train", "y_test"))
    return (x - mean) / deviation, y, (x_held - mean) / deviation, y_held


def pictures(cases: int = 1200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smooth noise of 3 x 32 x 32 that a random linear map sorts into ten classes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(cases, 3, 8, 8, generator=generator)
    x = nn.functional.interpolate(noise, size=32, mode="bilinear")
    y = (x.flatten(1) @ torch.randn(3 * 32 * 32, 10, generator=generator)).argmax(1)
    kept = cases // 6
    return x[kept:], y[kept:], x[:kept], y[:kept]
