from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.lab.training.evaluate import (
    CHUNK,
    NUMBERS,
    chunk_size,
    evaluate,
    evaluate_all,
    evaluation_due,
    spread,
)
from kfacore.roles import Split


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(23, 5, generator=generator)
    return Split(x, x)


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_chunks_do_not_change_the_means(data, chunk):
    model, likelihood = nn.Linear(5, 5), Bernoulli()
    z = model(data.inputs)
    found = evaluate(model, likelihood, data, chunk=chunk)
    assert found.loss == pytest.approx(likelihood.nll(z, data.targets).mean().item(), rel=1e-6)
    assert found.error == pytest.approx(likelihood.error(z, data.targets).mean().item(), rel=1e-6)


def test_evaluation_mode_is_used_and_restored(data):
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.9))
    assert evaluate(model, Bernoulli(), data) == evaluate(model, Bernoulli(), data)
    assert model.training
    assert model[0].weight.grad is None


def test_no_cases_have_no_mean():
    empty = torch.zeros(0, 5)
    assert math.isnan(evaluate(nn.Linear(5, 5), Bernoulli(), Split(empty, empty)).loss)


def test_missing_sets_are_none(data):
    model = nn.Linear(5, 5)
    result = evaluate_all(model, None, Bernoulli(), data, None)
    assert result["test_loss"] is None
    assert result["averaged_train_error"] is None
    both = evaluate_all(model, model, Bernoulli(), data, data)
    assert both["train_loss"] == both["test_loss"] == both["averaged_train_loss"] == both["averaged_test_loss"]
    assert set(both) == set(result)


@pytest.mark.parametrize(
    ("every", "early", "steps"),
    [
        (50, True, [0, 1, 2, 5, 10, 20, 50, 100]),
        (50, False, [0, 50, 100]),
        (7, True, [0, 1, 2, 5, 7, 14]),
        (1000, True, [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]),
        (1, True, [0, 1, 2, 3]),
        (0, True, []),
    ],
)
def test_when_evaluations_are_due(every, early, steps):
    last = steps[-1] if steps else 100
    assert [step for step in range(last + 1) if evaluation_due(step, every, early=early)] == steps


def test_large_cases_go_in_smaller_chunks() -> None:
    x = torch.zeros(10, 4)
    assert chunk_size(nn.Linear(4, 3), x) == CHUNK
    wide = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)), Widen(NUMBERS // 9 // 3))
    assert chunk_size(wide, x) == 9
    assert chunk_size(wide, x[:1]) == 1


class Widen(nn.Module):
    """Copies without memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, -1, self.width)


def test_spread_takes_cases_at_equal_distances() -> None:
    x = torch.arange(10.0)[:, None]
    some = spread(Split(x, x), 4)
    assert some.targets is some.inputs
    assert some.inputs[:, 0].tolist() == [0.0, 2.0, 5.0, 7.0]
    whole = Split(x, x + 1)
    assert spread(whole, 10) is whole
    assert spread(whole, None) is whole
    assert spread(None, 3) is None
    assert torch.equal(spread(whole, 3).targets, spread(whole, 3).inputs + 1)


def test_evaluation_keeps_the_mode_of_each_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    x = torch.rand(6, 4)
    evaluate(model, Gaussian(), Split(x, x[:, :2]))
    assert [part.training for part in model] == [True, False, True]
