"""Small image nets as users write them: name -> (model, inputs, targets, likelihood)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as users write it
from torch.nn.utils import parametrizations

__all__ = ["IMAGES"]

SIZE, CLASSES = 12, 4


def images(n: int = 16, channels: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(CLASSES, (n,), generator=generator)
    x = torch.randn(n, channels, size, size, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, label % channels, :: label // 2 + 1] += 1.0
    return x, y


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.LocalResponseNorm(3), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(16, CLASSES),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    last = 3
    for width in (4, 4, 0, 8, 8, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        last = width
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(32, CLASSES))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4), BasicBlock(4, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), DenseLayer(4, 3), DenseLayer(7, 3), nn.Conv2d(10, 6, 1), nn.AvgPool2d(2),
        DenseLayer(6, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, CLASSES),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    def __init__(self, width: int, expand: int) -> None:
        super().__init__()
        hidden = width * expand
        self.net = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Hardswish(), InvertedResidual(4, 3), SqueezeExcite(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.merge = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 4, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = torch.cat([a, self.up(b)], 1)
        return self.out(F.relu(self.norm(self.merge(c))))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(4, 6), MixerBlock(4, 6))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(dim=1))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return self.head(self.encoder(x)[:, 0])


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(12, 5), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.embed, self.out = nn.Linear(16, 6), nn.Linear(6, 1)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        a, b = (self.embed(self.tower(x)) for x in pair)
        return self.out((a - b).abs())


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma, self.head = nn.Parameter(torch.full((6,), 0.1)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.dw(x).permute(0, 2, 3, 1))
        x = x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)
        return self.head(x.mean((-2, -1)))


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8), nn.Tanh(),
        nn.LazyLinear(CLASSES),
    )  # fmt: skip


def normed(parametrize: Any) -> nn.Module:
    return nn.Sequential(
        parametrize(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        parametrize(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, CLASSES),
    )  # fmt: skip


class VAE(nn.Module):
    """Draws its code; pixels are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mu, self.logvar = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.dec = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.enc(x))
        mu, logvar = self.mu(h), self.logvar(h)
        return self.dec(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.label, self.box = nn.Linear(16, CLASSES), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"label": self.label(h), "box": self.box(h)}


def two_heads() -> tuple[nn.Module, Any, Any, Any]:
    from kfacore.optim.joint import Joint

    x, y = images()
    return TwoHeads(), x, {"label": y, "box": x.mean((2, 3))[:, :2]}, Joint({"label": "categorical", "box": "gaussian"})


def flat(binary: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(5)) @ torch.diag(torch.linspace(0.1, 1.5, 12))
    x = (x > 0).float() if binary else x
    return x, x


def frozen() -> nn.Module:
    """A pre-trained body in eval mode, a new head."""
    model = nn.Sequential(vgg()[0], nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False).eval()
    return model


IMAGES: dict[str, Any] = {
    "LeNet": lambda: (LeNet(), *images(channels=1, size=14), "categorical"),
    "AlexNet": lambda: (alexnet(), *images(), "categorical"),
    "VGG": lambda: (vgg(), *images(), nn.CrossEntropyLoss()),
    "ResNet": lambda: (resnet(), *images(), "categorical"),
    "DenseNet": lambda: (densenet(), *images(), "categorical"),
    "MobileNet": lambda: (mobilenet(), *images(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "ConvNeXt": lambda: (ConvNeXt(), *images(), "categorical"),
    "U-Net": lambda: (UNet(), images()[0], images()[0].argmax(1), nn.CrossEntropyLoss()),
    "MLP-Mixer": lambda: (Mixer(), *images(), "categorical"),
    "ViT": lambda: (ViT(), *images(), "categorical"),
    "autoencoder, tied": lambda: (TiedAutoencoder(), *flat(), "gaussian"),
    "variational autoencoder": lambda: (VAE(), *flat(binary=True), nn.BCEWithLogitsLoss()),
    "siamese": lambda: (
        Siamese(), (images()[0], images()[0].roll(1, 0)), (images()[1] == images()[1].roll(1)).float()[:, None],
        nn.BCEWithLogitsLoss(),
    ),
    "lazy": lambda: (lazy(), *images(), "categorical"),
    "weight norm": lambda: (normed(parametrizations.weight_norm), *images(), "categorical"),
    "spectral norm": lambda: (normed(parametrizations.spectral_norm), *images(), "categorical"),
    "weight norm, old style": lambda: (normed(torch.nn.utils.weight_norm), *images(), "categorical"),
    "frozen body": lambda: (frozen(), *images(), "categorical"),
    "several heads": two_heads,
}  # fmt: skip
