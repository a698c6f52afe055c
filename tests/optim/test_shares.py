"""How many cases serve statistics and quadratic model: ``min_cases`` counts positions where outputs have some."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC, Joint
from kfacore.network import Linearization, Linearizer

SHARES = {"estimator": {"tau1": 0.125, "min_cases": 20}, "momentum": {"tau2": 0.125, "min_cases": 40}}


class Words(nn.Module):
    """Classes of every position, (n, T, 3), or (n, 3, T) with the classes second."""

    def __init__(self, *, second: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.b(torch.tanh(self.a(x)))
        return z.transpose(1, 2) if self.second else z


class Heads(nn.Module):
    """A head for every position and one for the whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.a(x))
        return {"words": self.b(y), "lines": self.c(y.unflatten(1, (5, -1)).mean(2))}


def batch(k: int, n: int = 64, T: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, T, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return x, x[..., :3].argmax(-1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Cases of the statistics and of J v, a step."""
    found: list[tuple[int, int]] = []
    sampled: list[int] = []
    call, jvp = Linearizer.__call__, Linearization.jvp

    def linearize(self: Linearizer, inputs: Any, kept: int, *rest: Any, **named: Any) -> Linearization:
        sampled.append(kept)
        return call(self, inputs, kept, *rest, **named)

    def push(self: Linearization, directions: Any, cases: int | None = None) -> Tensor:
        product = jvp(self, directions, cases)
        found.append((sampled[-1], product.shape[1]))
        return product

    monkeypatch.setattr(Linearizer, "__call__", linearize)
    monkeypatch.setattr(Linearization, "jvp", push)
    return found


def kfac(model: nn.Module, **options: Any) -> KFAC:
    return KFAC(model.double(), **{"likelihood": "categorical", **SHARES, **options})


@pytest.mark.parametrize("second", [False, True])
def test_positions_are_counted_from_the_second_mini_batch_on(taken: list[tuple[int, int]], second: bool) -> None:
    optimizer = kfac(Words(second=second))
    for k in range(3):
        optimizer.step(*batch(k))
    optimizer.step(*batch(3, n=16))
    optimizer.step(*batch(4, n=3))
    assert taken == [(20, 40), (8, 8), (8, 8), (4, 8), (3, 3)]


def test_masked_positions_are_counted_too(taken: list[tuple[int, int]]) -> None:
    optimizer = kfac(Words())
    for k in range(2):
        x, y = batch(k, n=16)
        optimizer.step(x, y, torch.rand(16, 10, generator=torch.Generator().manual_seed(k)) > 0.5)
    assert taken == [(16, 16), (4, 8)]


def test_of_lengths_that_vary_the_shortest_counts(taken: list[tuple[int, int]]) -> None:
    optimizer = kfac(Words())
    for k, T in enumerate([10, 5, 20, 20]):
        optimizer.step(*batch(k, n=16, T=T))
    assert taken == [(16, 16), (4, 8), (8, 16), (8, 16)]


def test_of_several_heads_the_one_with_the_fewest_positions(taken: list[tuple[int, int]]) -> None:
    optimizer = kfac(Heads(), likelihood=Joint({"words": "categorical", "lines": "gaussian"}))
    for k in range(2):
        x, y = batch(k)
        optimizer.step(x, {"words": y, "lines": x[:, :5, :2].clone()})
    assert taken == [(20, 40), (8, 16)]


def test_outputs_without_positions_count_cases(taken: list[tuple[int, int]]) -> None:
    optimizer = kfac(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    for k in range(3):
        x, y = batch(k)
        optimizer.step(x[:, 0], y[:, 0])
    assert taken == [(20, 40)] * 3


def test_what_a_state_tells_and_what_one_of_before_does_not(
    taken: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on takes the cases that it would have taken, to the bit."""
    whole = kfac(Words())
    for k in range(2):
        whole.step(*batch(k))
    copies = [kfac(deepcopy(whole.model)) for _ in range(2)]
    copies[0].load_state_dict(whole.state_dict())
    before = {key: value for key, value in whole._own_state().items() if key != "positions"}
    with monkeypatch.context() as patch:
        patch.setattr(whole, "_own_state", lambda: before)
        copies[1].load_state_dict(whole.state_dict())
    taken.clear()
    for optimizer in (whole, *copies):
        optimizer.step(*batch(2))
    assert taken == [(8, 8), (8, 8), (20, 40)]
    one, other = (torch.cat([p.flatten() for p in optimizer.model.parameters()]) for optimizer in (whole, copies[0]))
    assert torch.equal(one, other)


def test_micro_batches_are_their_union() -> None:
    whole, pieces = kfac(Words()), kfac(Words())
    for k in range(4):
        x, y = batch(k, n=24)
        a, b = whole.step(x, y), pieces.step([(x[:5], y[:5]), (x[5:17], y[5:17]), (x[17:], y[17:])])
        for key in ("objective", "model_value", "rho"):
            torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=1e-8, atol=1e-10)
