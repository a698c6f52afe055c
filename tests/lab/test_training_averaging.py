from __future__ import annotations

import copy

import torch
from torch import nn

from kfacore.lab.training.averaging import IterateAverage


def _walk(steps):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2).double()
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        yield model


def test_matches_the_formula_in_a_loop():
    start, decay = 4, 0.8
    expected = None
    average = None
    for k, model in enumerate(_walk(20), start=1):
        if average is None:
            average = IterateAverage(model, start=start, decay=decay)
        average.update(model, k)
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        if k < start:
            assert average.model is None
            continue
        f = min(1 - 1 / (k - start + 1), decay)
        expected = theta.clone() if expected is None else f * expected + (1 - f) * theta
        found = torch.cat([p.reshape(-1) for p in average.model.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_first_average_is_the_iterate_itself_and_the_next_ones_are_means():
    models = [copy.deepcopy(model) for model in _walk(3)]
    average = IterateAverage(models[0], start=1, decay=0.99)
    for k, model in enumerate(models, start=1):
        average.update(model, k)
        mean = torch.stack([m.weight for m in models[:k]]).mean(dim=0)
        torch.testing.assert_close(average.model.weight, mean, rtol=1e-14, atol=1e-14)


def test_state_goes_on_bit_for_bit():
    models = [copy.deepcopy(model) for model in _walk(10)]
    one = IterateAverage(models[0], start=2, decay=0.9)
    other = IterateAverage(models[0], start=2, decay=0.9)
    for k in range(1, 11):
        one.update(models[k - 1], k)
        if k == 5:
            other.load_state_dict(copy.deepcopy(one.state_dict()))
        elif k > 5:
            other.update(models[k - 1], k)
    assert torch.equal(one.model.weight, other.model.weight)


def test_it_never_touches_the_model():
    model = next(_walk(1))
    before = model.weight.clone()
    average = IterateAverage(model, start=1, decay=0.5)
    average.update(model, 1)
    with torch.no_grad():
        average.model.weight.zero_()
    assert torch.equal(model.weight, before)
    assert not average.model.weight.requires_grad
