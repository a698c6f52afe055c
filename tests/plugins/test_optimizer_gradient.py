"""What the gradient methods share: h and its gradient, against autodiff of the formula."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.optimizers import NesterovConfig
from kfac_plugins.optimizers.gradient import GradientOptimizer
from kfac_plugins.optimizers.nesterov import Nesterov

ETA = 0.3


def optimizer_of(model: nn.Module) -> GradientOptimizer:
    """The measuring is the base's, whichever of its optimizers has it."""
    return Nesterov(model, Categorical(), NesterovConfig(), ETA)


def build() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))


def test_objective_and_gradient_are_those_of_the_formula() -> None:
    model, x, y = build()
    twin = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(twin(x), y)
    objective = loss + 0.5 * ETA * sum(parameter.square().sum() for parameter in twin.parameters())
    objective.backward()
    before = copy.deepcopy(model.state_dict())
    measured = optimizer_of(model).measure(x, y)
    torch.testing.assert_close(measured.loss, loss.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(measured.objective, objective.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(measured.gradients, [p.grad for p in twin.parameters()], rtol=1e-10, atol=1e-14)
    wrong = (twin(x).argmax(dim=1) != y).double().mean()
    torch.testing.assert_close(measured.error.double(), wrong, rtol=1e-12, atol=0.0)
    assert not any(t.requires_grad for t in (measured.loss, measured.objective, measured.error, *measured.gradients))
    # measuring moves nothing, and leaves no gradients behind that a later step would add to
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_have_no_part_in_it() -> None:
    model, x, y = build()
    model[0].weight.requires_grad_(False)
    optimizer = optimizer_of(model)
    assert [id(p) for p in optimizer.parameters] == [id(p) for p in model.parameters() if p.requires_grad]
    measured = optimizer.measure(x, y)
    assert len(measured.gradients) == 3
    squares = sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad)
    torch.testing.assert_close(measured.objective - measured.loss, 0.5 * ETA * squares.detach(), rtol=1e-10, atol=0.0)
