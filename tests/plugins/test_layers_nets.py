"""Whole nets: the rows of every block give the gradient of every case, as autograd has it for each case alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_modules import Conv1D, GemmaRMSNorm
from layer_rows import passes, watch
from torch import Tensor, nn

Float = torch.float64
CASES = 3


class TinyViT(nn.Module):
    """Patches by a convolution, a class token, positions, transformer layers."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Translator(nn.Module):
    """Encoder and decoder: causal self attention, cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.net = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source, target = self.words(source), self.words(target)
        mask = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.net(source, target, tgt_mask=mask))


class SmallGpt(nn.Module):
    """As transformers writes it: fused attention weights in a Conv1D, an RMS norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(6, 4), nn.Embedding(4, 4)
        self.norm, self.qkv, self.project = GemmaRMSNorm(4), Conv1D(12, 4), Conv1D(4, 4)
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]).expand_as(tokens))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.mT + torch.full((q.shape[1],) * 2, -1e30, dtype=Float).triu(1)
        return self.head(x + self.project(scores.softmax(-1) @ v))


class Tagger(nn.Module):
    """Recurrent layers and a bilinear score."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.cell = nn.RNNCell(3, 3)
        self.score = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        h = y[:, 0]
        for t in range(y.shape[1]):
            h = self.cell(y[:, t], h)
        return self.score(y, h[:, None].expand_as(y))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect", groups=2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=4, padding=1, padding_mode="replicate"),
        nn.BatchNorm2d(4).eval(),
        nn.Tanh(),
        nn.Conv2d(4, 2, 1, bias=False),
    )


def images(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(CASES, 2, 4, 4, generator=generator, dtype=Float),)


def sequences(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(CASES, 4, 3, generator=generator, dtype=Float),)


def words(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(6, (CASES, 4), generator=generator),)


def pairs(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randint(7, (CASES, t), generator=generator) for t in (4, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[Tensor, ...]]]] = {
    "ViT": (lambda: TinyViT(norm_first=True), images),
    "ViT, norms last": (lambda: TinyViT(norm_first=False), images),
    "encoder and decoder": (Translator, pairs),
    "GPT": (SmallGpt, words),
    "recurrent": (Tagger, sequences),
    "images to images": (decoder, images),
}


@pytest.mark.parametrize("name", NETS)
def test_rows_of_every_case_give_its_gradient(name: str) -> None:
    make, inputs = NETS[name]
    generator = torch.Generator().manual_seed(4)
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    x = inputs(generator)
    z, seen = watch(model, lambda: model(*x))
    torch.testing.assert_close(z, model(*x), rtol=1e-11, atol=1e-11)
    v = torch.randn(z.shape, generator=generator, dtype=Float)
    gradients = passes(seen, z, v[None])
    unread = dict(model.named_parameters())
    for i in range(CASES):
        alone = (model(*(part[i : i + 1] for part in x)) * v[i : i + 1]).sum()
        named = dict(model.named_parameters())
        wanted = dict(
            zip(
                named,
                torch.autograd.grad(alone, list(named.values()), allow_unused=True, materialize_grads=True),
                strict=True,
            )
        )
        scale = max(float(g.abs().max()) for g in wanted.values())
        for block_name, each in seen.items():
            found = case_gradient(each, gradients[block_name][0], i)
            prefix = "" if each.module is model else next(n for n, m in model.named_modules() if m is each.module) + "."
            own = {key.removeprefix(prefix): g for key, g in wanted.items() if key.startswith(prefix)}
            for part, view in zip(
                each.layer.split(each.block, each.module, found),
                each.layer.view(each.block, each.module, own),
                strict=True,
            ):
                assert float((part - view).abs().max()) < 1e-10 * scale, block_name
            for param in each.block.params:
                unread.pop(param.partition("[")[0], None)
    assert set(unread) <= {"token", "positions"}  # raw parameters, of no layer


def case_gradient(each: Any, gradients: Tensor, i: int) -> Tensor:
    if each.block.kind == "full":
        return gradients[i, 0].reshape(each.block.shape)
    rows, counts = each.rows()
    total = torch.einsum("rgo,rgi->goi", gradients[i] * counts[i, :, None, None], rows[i])
    return total.reshape(each.block.shape)
