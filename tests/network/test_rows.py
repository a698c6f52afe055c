"""Rows, masks and counts of blocks that are not called once on one row a case, against plain loops."""

from __future__ import annotations

import any_network
import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.likelihoods.categorical import Categorical
from kfacore.registry import get_registry
from kfacore.roles import LayerSamples

N, T = 6, 4


def sequence() -> nn.Module:
    return any_network.scattered(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))


def seen(model: nn.Module, x: Tensor, kept: int, v: Tensor, **options: object) -> list[LayerSamples]:
    found = any_network.linearizer(model)
    return [s for s in found(x, kept).backpropagate(v, **options) if s is not None]  # type: ignore[arg-type]


def test_every_position_is_a_row() -> None:
    model, x, v = sequence(), dense.randn(N, T, 3), dense.randn(2, 4, T, 2)
    a, b = seen(model, x, 4, v)
    assert (a.positions, a.rows, a.divisor, a.cases) == (T, 4 * T, 4, 4)
    assert torch.equal(a.inputs[:, :3], x[:4].flatten(0, 1))
    assert bool((a.inputs[:, 3] == 1).all())
    assert torch.equal(b.gradients, v.flatten(1, 2))


def test_positions_that_do_not_count_are_left_out() -> None:
    model, x, v = sequence(), dense.randn(N, T, 3), dense.randn(1, 4, T, 2)
    valid = torch.arange(T) < torch.tensor([4, 2, 3, 1]).unsqueeze(1)
    a, b = seen(model, x, 4, v, valid=valid, total=valid.sum())
    assert int(a.rows) == int(valid.sum()) == int(a.divisor) == 10
    zero = ~valid.flatten()
    assert not a.inputs[zero].any()
    assert not b.gradients[:, zero].any()
    assert torch.equal(b.gradients[0, valid.flatten()], v[0][valid])


def test_rows_of_a_layer_with_other_positions_all_count() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh().unflatten(1, (2, 2)).mean(2))  # two positions of z for four of a

    model = any_network.scattered(Pooled())
    valid = torch.tensor([[True, False]] * N)
    a, b = seen(model, dense.randn(N, T, 3), N, dense.randn(1, N, 2, 2), valid=valid, total=N)
    assert (a.count, int(b.rows)) == (None, N)


def test_rows_of_a_module_that_is_used_several_times_lie_beside_each_other() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.a(self.a(x).tanh()).tanh())
            return z

    model, x = any_network.scattered(Twice()), dense.randn(N, 4)
    a, _ = seen(model, x, 3, dense.randn(1, 3, 2))
    assert (a.positions, a.divisor) == (2, 3)
    rows = a.inputs.view(3, 2, 5)
    assert torch.equal(rows[:, 0, :4], x[:3])
    assert dense.relative(rows[:, 1, :4], model.a(x[:3]).tanh().detach()) < 1e-14


def test_pooled_rows_that_get_one_g_are_reduced_by_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Flatten(1, 1), Mean(), nn.Linear(5, 2))
    model, x, v = any_network.scattered(model), dense.randn(N, T, 3), dense.randn(1, N, 2)
    a, _ = seen(model, x, N, v)
    assert (a.positions, len(a.inputs)) == (1, N)
    assert dense.relative(a.inputs[:, :3], x.mean(1)) < 1e-14
    (wanted,) = torch.autograd.grad(model(x), model[0].weight, v[0])
    assert dense.relative(a.gradients[0].T @ a.inputs[:, :3], wanted) < 1e-12


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_reduce_is_said_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh().mean(1))

    model, x = any_network.scattered(Net()), dense.randn(N, T, 3)
    expand = any_network.linearizer(model)(x).backpropagate(dense.randn(1, N, 2))[0]
    reduce = any_network.linearizer(model, reduce=["a"])(x).backpropagate(dense.randn(1, N, 2))[0]
    assert expand is not None
    assert reduce is not None
    assert dense.relative(reduce.inputs, expand.inputs.view(N, T, 4).mean(1)) < 1e-14
    assert dense.relative(reduce.gradients, expand.gradients.view(1, N, T, 5).sum(2)) < 1e-14


@pytest.mark.parametrize("estimator", ["monte-carlo", "exact"])
def test_squares_of_a_raw_parameters_gradients_are_the_diagonal_in_the_mean(estimator: str) -> None:
    """Over the draws: of targets, or of the signs that keep cases and positions apart."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shift = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.3, -0.2]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.shift).tanh()

    model, x = any_network.scattered(Raw()), dense.randn(3, 3)
    found = any_network.linearizer(model)
    batch, likelihood = found(x), Categorical()
    z = batch.statistics_outputs()
    J = torch.autograd.functional.jacobian(lambda s: (model.a(x) + s).tanh(), model.shift.detach())  # (n, o, 2)
    wanted = torch.einsum("noi,nop,npi->i", J, dense.metric("categorical", z), J)
    generator = torch.Generator().manual_seed(0)
    part = get_registry().build("estimator", {"kind": estimator, "tau1": 1.0})
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(4000):
        sample = batch.samples(part, torch.zeros(3, dtype=torch.long), likelihood, generator)[1]
        assert sample is not None
        assert sample.divisor == 3
        total += sample.gradients.square().sum((0, 1)) / 4000
    assert dense.relative(total, wanted) < 0.06


def test_a_batch_that_is_not_cut_has_zero_vectors_beyond_the_estimators_cases() -> None:
    model = any_network.scattered(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)))
    x, v = dense.randn(N, 3), dense.randn(1, 2, 2)
    found = any_network.linearizer(model)
    batch = found(x, 2)
    assert batch.statistics_outputs().shape == (2, 2)
    a, b = batch.backpropagate(v)
    assert a is not None
    assert b is not None
    assert (len(a.inputs), a.divisor) == (N, 2)  # rows of all cases, S of the estimator's
    assert not b.gradients[:, 2:].any()
    assert a.gradients[:, 2:].any()
    (wanted,) = torch.autograd.grad(model(x)[:2], model[0].weight, v[0])
    assert dense.relative(a.gradients[0].T @ a.inputs[:, :3], wanted) < 1e-10


def test_a_model_that_draws_but_does_not_mix_keeps_the_estimators_rows() -> None:
    model = any_network.scattered(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)))
    a, _ = seen(model, dense.randn(N, 3), 2, dense.randn(1, 2, 2))
    assert (len(a.inputs), a.divisor) == (2, 2)
