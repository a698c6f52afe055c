from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfacore.lab.training.evaluate import evaluate, evaluate_all, evaluation_due
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
