"""Small classifiers of images (n, c, h, w): a residual net, a plain convolutional one, a vision transformer.

Sources: He et al., "Deep residual learning for image recognition", 2016; Simonyan & Zisserman, "Very deep
convolutional networks", 2015 (3x3 convolutions, pooling between stages); Dosovitskiy et al., "An image is worth 16x16
words", 2021, with the mean over patches in place of a class token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfacore.errors import ConfigError
from kfacore.lab.models.gpt import Branches
from kfacore.lab.models.initial import he_init, normal_init

__all__ = ["IMAGE_MODELS", "PlainCNN", "SmallResNet", "VisionTransformer"]


class _Residual(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); the shortcut is x, or a 1x1 convolution of it."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + y)


class SmallResNet(nn.Module):
    """A residual net with batch norm: three stages of ``depth`` blocks, w, 2 w and 4 w channels, half the size each.

    Args:
        shape: (channels, height, width) of an image.
        classes: Outputs.
        width: w.
        depth: Residual blocks a stage.
        generator: A CPU generator, the source of all parameters.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, width: int, depth: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = width
        for stage in range(3):
            after = width * 2**stage
            for block in range(depth):
                stages.append(_Residual(before, after, 2 if stage and not block else 1))
                before = after
        self.stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)
        he_init(self, generator)

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        """Natural parameters of the classes."""
        z: Tensor = self.head(self.stages(torch.relu(self.stem(x))).mean((2, 3)))
        return z


class PlainCNN(nn.Module):
    """3x3 convolutions with ReLU, ``depth`` a stage, w, 2 w and 4 w channels, and a mean over the last stage's places.

    Stages end with 2x2 pooling as long as the image has two rows and columns left.

    Args:
        shape: (channels, height, width) of an image.
        classes: Outputs.
        width: w.
        depth: Convolutions a stage.
        generator: A CPU generator, the source of all parameters.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, width: int, depth: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, side = shape[0], min(shape[1:])
        for stage in range(3):
            for _ in range(depth):
                layers += [nn.Conv2d(before, width * 2**stage, 3, padding=1), nn.ReLU()]
                before = width * 2**stage
            if stage < 2 and side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)
        he_init(self, generator)

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        """Natural parameters of the classes."""
        z: Tensor = self.head(self.features(x).mean((2, 3)))
        return z


class VisionTransformer(nn.Module):
    """Patches as tokens of a transformer, and a mean over them.

    Args:
        shape: (channels, height, width) of an image; the patch must divide height and width.
        classes: Outputs.
        width: d.
        depth: Blocks.
        heads: Heads of each block.
        patch: Height and width of a patch.
        dropout: Share of each branch's outputs that is dropped.
        generator: A CPU generator, the source of all parameters.

    Raises:
        ConfigError: The patch does not divide the image, or the heads the width.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if shape[1] % patch or shape[2] % patch:
            raise ConfigError(
                f"images of {shape[1]} x {shape[2]} cannot be cut into patches of {patch} x {patch}; choose a "
                "problem.patch that divides both"
            )
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.position = nn.Embedding(shape[1] * shape[2] // patch**2, width)
        self.blocks = nn.ModuleList(Branches(width, heads, dropout, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        ends = [layer for block in self.blocks if isinstance(block, Branches) for layer in block.ends]
        normal_init(self, generator, smaller=ends)
        with torch.no_grad():  # the patches are inputs and no one-hot rows: their layer keeps the inputs' scale
            self.patches.weight.normal_(0.0, self.patches.weight[0].numel() ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        """Natural parameters of the classes."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.position(torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
        for block in self.blocks:
            x = block(x)
        z: Tensor = self.head(self.norm(x).mean(1))
        return z


IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": SmallResNet,
    "cnn": PlainCNN,
    "vit": VisionTransformer,
}
"""The models by the name that a configuration has for them."""
