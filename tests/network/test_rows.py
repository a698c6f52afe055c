"""Rows, masks and counts of blocks that are not called once on one row a case, against plain loops."""

from __future__ import annotations

from typing import Any

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


class Positioned(nn.Module):
    """Positions first inside, dropout, and as many positions as cases; an embedding of positions, a net of them."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.bias = nn.Embedding(N, 4), nn.Linear(2, 4)
        self.a, self.norm, self.drop, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.linspace(0.0, 1.0, N, dtype=x.dtype)
        x = self.a(x.transpose(0, 1)) + self.places(torch.arange(N)).unsqueeze(1)
        x = self.norm(x + self.bias(torch.stack([t, t.square()], 1)).unsqueeze(1))
        return self.b(self.drop(x.tanh())).transpose(0, 1)


def test_where_the_cases_are_is_found_out_where_shapes_do_not_say_it() -> None:
    model, x, kept = any_network.scattered(Positioned()), dense.randn(N, N, 3), 2
    found = any_network.linearizer(model)
    any_network.seed()
    batch = found(x, kept)
    assert not found.cut
    v, valid = dense.randn(1, kept, N, 2), torch.ones(kept, N, dtype=torch.bool)
    valid[0, 1] = False
    v = v * valid[..., None]
    seen = dict(zip((b.info.name for b in found.layers), batch.backpropagate(v, valid=valid), strict=True))
    any_network.seed()
    z = model(x)
    parameters = dict(model.named_parameters())
    wanted = dict(zip(parameters, torch.autograd.grad(z[:kept], list(parameters.values()), v[0]), strict=True))
    for name in ("a", "b"):  # rows of the estimator's cases, in their order
        s = seen[name]
        assert s is not None
        assert (len(s.inputs), s.positions, int(s.rows)) == (kept * N, N, kept * N - 1)
        assert dense.relative((s.gradients[0].T @ s.inputs)[:, :-1], wanted[f"{name}.weight"]) < 1e-10
    assert dense.relative(seen["a"].inputs[:, :-1], (x[:kept] * valid[..., None]).flatten(0, 1)) < 1e-12  # type: ignore[union-attr]
    norm = seen["norm"]
    assert norm is not None
    assert norm.gradients.shape == (1, kept, 8)
    assert dense.relative(norm.gradients.sum((0, 1))[:4], wanted["norm.weight"]) < 1e-10
    for name in ("places", "bias"):  # of no case: all of them
        s = seen[name]
        assert s is not None
        assert (len(s.inputs), s.positions) == (N, None)
    total = torch.zeros(4, N, dtype=torch.float64).index_add_(1, seen["places"].inputs, seen["places"].gradients[0].T)  # type: ignore[union-attr]
    assert dense.relative(total.T, wanted["places.weight"]) < 1e-10


def test_rows_of_other_cases_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution's patches take a kernel's size of the memory of its inputs."""
    from kfac_plugins.layers.convolution import Convolution

    sizes: list[int] = []
    own = Convolution.rows

    def rows(self: Any, block: Any, module: Any, use: Any) -> Tensor:
        sizes.append(len(use.inputs))
        return own(self, block, module, use)

    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8, 2)).double()
    batch = any_network.linearizer(model)(dense.randn(6, 1, 3, 3), 2)
    monkeypatch.setattr(Convolution, "rows", rows)
    batch.backpropagate(dense.randn(1, 2, 2))
    assert sizes == [2]
