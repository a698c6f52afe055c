"""A guest of a model whose outputs have positions: means over tokens with ignored ones, and other units of the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from guests import EXACT, guest
from torch import Tensor, nn

from kfacore import KFAC

GAMMA = 0.1
IGNORED = -100


class Tagger(nn.Module):
    """Tokens to classes: an embedding, a norm, a layer that sees earlier positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.inner, self.norm, self.head = (
            nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(torch.tanh(self.norm(self.inner(x) + x.cumsum(1))))


def tokens() -> tuple[Tensor, Tensor]:
    """Tokens (12, 5), and classes of which a third is ignored, more of them in some cases than in others."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, most, (12, 5), generator=generator) for most in (11, 4))
    ignored = torch.rand(12, 5, generator=generator) < torch.linspace(0.0, 0.7, 12)[:, None]
    assert 0 < int(ignored.sum()) < 40
    return x, torch.where(ignored, IGNORED, y)


def of_kfac(model: nn.Module, x: Tensor, y: Tensor, likelihood: Any, approx: Any) -> tuple[list[Tensor], Any]:
    """F-hat^-1 grad h of `KFAC` itself, one tensor a parameter, and the optimizer."""
    kfac = KFAC(
        model, likelihood=likelihood, approx=approx, estimator=EXACT, weight_decay=0.0, momentum="none", trust="none",
        damping={"kind": "fixed", "lambda0": GAMMA**2}, fill_grad=True,
    )  # fmt: skip
    kfac.step(x, y)
    assert kfac.preconditioner is not None
    layers = kfac.linearizer.layers
    own = {p: p.grad for p in model.parameters() if p.grad is not None}
    found = {p: torch.full_like(p, torch.nan) for p in model.parameters()}
    gradients = []
    for block in layers:
        matrix = torch.zeros(block.info.shape, dtype=torch.float64)
        for part, view in zip(block.split(matrix), block.view(lambda p: own[p]), strict=True):
            part.copy_(view)
        gradients.append(matrix)
    for block, solved in zip(layers, kfac.preconditioner.solve(gradients), strict=True):
        for view, part in zip(block.view(lambda p: found[p]), block.split(solved), strict=True):
            view.copy_(part)
    return [found[p] for p in model.parameters()], kfac


MEAN_OVER_TOKENS = nn.CrossEntropyLoss(ignore_index=IGNORED)
PER_EXAMPLE = {"kind": "categorical", "per": "example"}


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 4, 2, 3, 2)])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["blockdiag", "tridiag"])
@pytest.mark.parametrize("loss", ["ignored, by targets", "ignored, by valid", "all, over tokens", "all, over examples"])
def test_a_plain_step_is_kfacs_own_direction(loss: str, kind: str, power: float, sizes: tuple[int, ...]) -> None:
    model = Tagger().double()
    x, y = tokens()
    y = y if loss.startswith("ignored") else y.clamp(min=0)
    likelihood: Any = {"ignored": MEAN_OVER_TOKENS, "all, over tokens": "categorical"}.get(
        loss.split(", by")[0], PER_EXAMPLE
    )
    approx = {"kind": kind, "power": power}
    wanted, kfac = of_kfac(copy.deepcopy(model), x, y, likelihood, approx)
    start = [p.detach().clone() for p in model.parameters()]
    opt = guest(
        model, likelihood=likelihood, approx=kfac.approx, estimator=EXACT, scale="none", rest="diagonal", gamma=GAMMA,
        pi=kfac.damping.config.pi,
    )  # fmt: skip
    counted = len(x) if loss == "all, over examples" else int((y != IGNORED).sum())
    for part, target in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        with opt.watch():
            z = model(part)
        if loss == "ignored, by targets":
            opt.observe(z, target)
        elif loss == "ignored, by valid":
            opt.observe(z, valid=target != IGNORED)
        else:
            opt.observe(z)
        value = nn.functional.cross_entropy(z.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
        (value / counted).backward()
    opt.step()
    for p, old, d in zip(model.parameters(), start, wanted, strict=True):
        assert float((old - p.detach() - d).abs().max()) < 1e-12 * (1 + float(d.abs().max()))
