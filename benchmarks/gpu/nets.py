"""The nets that steps are timed on, with a batch and a loss: the paper's MNIST autoencoder, a GPT, a residual net."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.nets import NETS, build_chain
from kfacore.lab.models.gpt import GPT

__all__ = ["Task", "autoencoder", "gpt", "residual"]


@dataclass(frozen=True)
class Task:
    """A net with what it is trained on.

    Attributes:
        name: For tables.
        build: Makes the net, the same one each time, on its device.
        inputs: One mini-batch; random, for times do not depend on it.
        targets: Likewise.
        likelihood: What the outputs mean.
        low: Whether forward and backward passes run under autocast to bfloat16.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    likelihood: str
    low: bool = False

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.inputs.device

    def loss(self, z: Tensor) -> Tensor:
        """The mean loss, as a loop would write it."""
        if self.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(z, self.targets, reduction="sum") / len(z)
        return functional.cross_entropy(z.flatten(0, -2), self.targets.flatten())

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.low else nullcontext()


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def autoencoder(device: torch.device, batch: int, *, small: bool) -> Task:
    """784-1000-500-250-30 and back, in float32."""
    widths = (20, 12, 6, 12, 20) if small else NETS["mnist"]
    x = _random(batch, widths[0]).to(device)
    name = f"autoencoder {'-'.join(map(str, widths[: len(widths) // 2 + 1]))}, batch {batch}"
    return Task(name, lambda: build_chain(widths, device), x, x, "bernoulli")


def gpt(device: torch.device, *, small: bool) -> Task:
    """Twelve blocks of width 768 on 32 pieces of 512 tokens, 50,304 known ones, the head tied: 124 million numbers."""
    layers, width, heads, context, pieces, tokens = (2, 16, 2, 8, 4, 50) if small else (12, 768, 12, 512, 32, 50304)
    ids = (_random(pieces, context + 1) * tokens).long().to(device)

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        sizes = {"layers": layers, "width": width, "heads": heads}
        return GPT(tokens, context, **sizes, dropout=0.0, tied=True, generator=generator).to(device)

    name = f"GPT {layers} x {width}, {pieces} x {context} tokens, bfloat16"
    return Task(name, build, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), "categorical", low=True)


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        sizes = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        self.path = nn.Sequential(*(part for size in sizes for part in _convolution(*size, last=size[1] == after)))
        straight = before == after and stride == 1
        self.shortcut = nn.Identity() if straight else nn.Sequential(*_convolution(before, after, 1, stride, last=True))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w)."""
        return functional.relu(self.path(x) + self.shortcut(x))


def _convolution(before: int, after: int, size: int, stride: int, *, last: bool) -> list[nn.Module]:
    parts: list[nn.Module] = [nn.Conv2d(before, after, size, stride, size // 2, bias=False), nn.BatchNorm2d(after)]
    return parts if last else [*parts, nn.ReLU()]


def residual(device: torch.device, *, small: bool) -> Task:
    """The shape of ResNet-50 (He et al. 2016): stages of 3, 4, 6 and 3 bottlenecks, 64 images of 224 x 224."""
    depths, first, side, images, classes = ((1, 1), 4, 16, 4, 5) if small else ((3, 4, 6, 3), 64, 224, 64, 1000)
    x = _random(images, 3, side, side).to(device)
    y = (_random(images) * classes).long().to(device)

    def build() -> nn.Module:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            widths = [first * 2**i for i in range(len(depths))]
            befores = [first, *(4 * width for width in widths)]
            stem = [*_convolution(3, first, 7, 2, last=False), nn.MaxPool2d(3, 2, 1)]
            blocks = [
                _Bottleneck(before if i == 0 else after, width, 2 if i == 0 and stage > 0 else 1)
                for stage, ((before, after), width, depth) in enumerate(
                    zip(pairwise(befores), widths, depths, strict=True)
                )
                for i in range(depth)
            ]
            end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(befores[-1], classes)]
            return nn.Sequential(*stem, *blocks, *end).to(device)

    name = f"residual net {'-'.join(map(str, depths))}, {images} images of {side} x {side}, bfloat16"
    return Task(name, build, x, y, "categorical", low=True)
