"""The quadratic model against the dense Fisher, and its minimum against dense solves."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from torch import Tensor

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore import host
from kfacore.network import Linearizer
from kfacore.optim.quadratic import fisher_gram, minimise_one, minimise_two, model_value, on_planes

LIKELIHOODS = {"bernoulli": Bernoulli, "categorical": Categorical, "gaussian": Gaussian}
Float = torch.float64


def value(M: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x @ M @ x + b @ x


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gram_is_the_fisher_on_the_directions(likelihood: str, k: int) -> None:
    model = dense.net((4, 5, 3))
    x = dense.randn(12, 4)
    n = 7
    linearizer = Linearizer(model)
    batch = linearizer(x, 3)
    F = dense.fisher(model, likelihood, x[:n])
    v = dense.randn(k, len(F))
    layers = dense.infos(model)
    z = torch.cat(batch.outputs())[:n]
    gram = fisher_gram(LIKELIHOODS[likelihood](), z, batch.jvp([dense.unvec(u, layers) for u in v], n))
    assert gram.dtype == Float
    assert dense.relative(gram, v @ F @ v.T) < 1e-10
    assert torch.equal(gram, gram.T)


def test_gram_adds_up_in_double_precision() -> None:
    """Many equal terms: single precision would lose digits."""
    n = 200_000
    t = torch.full((1, n, 1), 0.1, dtype=torch.float32)
    gram = fisher_gram(Gaussian(), torch.zeros(n, 1), t)
    wanted = float(torch.tensor(0.1, dtype=torch.float32).double() ** 2)
    assert gram.dtype == Float
    assert abs(float(gram) / wanted - 1) < 1e-7


def test_planes_pick_the_common_direction() -> None:
    M = dense.randn(4, 4)
    M = M @ M.T
    b = dense.randn(4, seed=1)
    planes, lines = on_planes(M, b)
    assert planes.shape == (3, 2, 2)
    for i in range(3):
        keep = torch.tensor([i, 3])
        assert torch.equal(planes[i], M[keep][:, keep])
        assert torch.equal(lines[i], b[keep])


def test_minimum_on_planes_is_the_dense_solution() -> None:
    roots, b = dense.randn(50, 2, 2), dense.randn(50, 2, seed=1)
    M = roots @ roots.mT + 1e-3 * torch.eye(2, dtype=Float)
    x = minimise_two(M, b)
    wanted = -torch.linalg.solve(M, b)
    assert dense.relative(x, wanted) < 1e-10
    assert dense.relative(model_value(M, b, x), 0.5 * (b * wanted).sum(1)) < 1e-10
    for i in range(50):
        assert abs(float(model_value(M, b, x)[i] - value(M[i], b[i], x[i]))) < 1e-12


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 0.5), (0.3, math.inf)])
def test_minimum_within_bounds_is_the_best_point_there(bounds: tuple[float, float]) -> None:
    roots, b = dense.randn(40, 2, 2), dense.randn(40, 2, seed=1)
    M = roots @ roots.mT + 1e-2 * torch.eye(2, dtype=Float)
    x = minimise_two(M, b, bounds)
    free = minimise_two(M, b)
    assert bool(((x[:, 1] >= bounds[0]) & (x[:, 1] <= bounds[1])).all())
    inside = (free[:, 1] >= bounds[0]) & (free[:, 1] <= bounds[1])
    assert 0 < int(inside.sum()) < 40
    assert torch.equal(x[inside], free[inside])
    best = model_value(M, b, x)
    for y in torch.linspace(max(bounds[0], -20.0), min(bounds[1], 20.0), 101, dtype=Float):
        alpha = minimise_one(M[:, 0, 0], b[:, 0] + M[:, 0, 1] * y)
        there = model_value(M, b, torch.stack([alpha, y.expand(40)], 1))
        assert bool((best <= there + 1e-12 * there.abs()).all())


def test_host_and_device_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is nothing to solve: zero and parallel directions, and what is not a number."""
    roots, b = dense.randn(20, 2, 2), dense.randn(20, 2, seed=1)
    M = roots @ roots.mT
    M[3] = 0.0
    M[4] = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=Float)
    M[5, 0, 0] = M[5, 0, 1] = M[5, 1, 0] = 0.0
    M[6] = math.nan
    for bounds in ((-math.inf, math.inf), (0.0, 1.0)):
        monkeypatch.undo()
        x = minimise_two(M, b, bounds)
        value_here = model_value(M, b, x)
        monkeypatch.setattr(host, "is_free", lambda value: False)
        there = minimise_two(M, b, bounds)
        torch.testing.assert_close(x, there, rtol=1e-14, atol=0.0, equal_nan=True)
        torch.testing.assert_close(value_here, model_value(M, b, there), rtol=1e-12, atol=1e-14, equal_nan=True)


def test_minimum_on_lines() -> None:
    m, b = torch.tensor([2.0, 0.5, 0.0], dtype=Float), torch.tensor([3.0, -1.0, 0.0], dtype=Float)
    assert minimise_one(m, b).tolist() == [-1.5, 2.0, 0.0]


def plane(u: list[float], v: list[float], grad: list[float]) -> tuple[Tensor, Tensor]:
    """M and b of two directions in the plane with curvature diag(2, 1)."""
    V = torch.tensor([u, v], dtype=Float)
    F = torch.diag(torch.tensor([2.0, 1.0], dtype=Float))
    return (V @ F @ V.T)[None], (V @ torch.tensor(grad, dtype=Float))[None]


@pytest.mark.parametrize(
    ("u", "v", "grad"),
    [
        ([1.0, 2.0], [-2.0, -4.0], [0.3, -1.0]),  # parallel
        ([1.0, 2.0], [1e-8, 2e-8], [0.3, -1.0]),  # parallel and of very different length
        ([1.0, 2.0], [0.0, 0.0], [0.3, -1.0]),  # no previous step
        ([0.0, 0.0], [1.0, 2.0], [0.3, -1.0]),  # no proposal
        ([0.0, 0.0], [0.0, 0.0], [0.3, -1.0]),  # nothing
        ([1.0, 2.0], [3.0, -1.0], [0.0, 0.0]),  # zero gradient
        ([1e-20, 0.0], [0.0, 1e20], [1.0, 1.0]),  # far apart in scale, yet regular
        ([1.0, 1.0], [1.0, 1.0 + 1e-5], [0.3, -1.0]),  # nearly parallel, still resolved
    ],
)
def test_degenerate_planes_reach_the_minimum(u: list[float], v: list[float], grad: list[float]) -> None:
    M, b = plane(u, v, grad)
    x = minimise_two(M, b)
    assert bool(torch.isfinite(x).all())
    wanted = -(torch.linalg.pinv(M[0], rtol=1e-13) @ b[0])
    if not (u[0] == 1e-20 or v[1] == 1.0 + 1e-5):
        found, best = float(value(M[0], b[0], x[0])), float(value(M[0], b[0], wanted))
        assert found == pytest.approx(best, rel=1e-9, abs=1e-300)
    else:  # pinv cannot see these scales; the whole plane's minimum is known in closed form
        best = -0.5 * (grad[0] ** 2 / 2.0 + grad[1] ** 2)
        assert float(model_value(M, b, x)[0]) == pytest.approx(best, rel=1e-5)


def test_model_value_of_a_step_that_is_no_minimum() -> None:
    M, b = plane([1.0, 0.0], [0.0, 1.0], [1.0, -2.0])
    x = torch.tensor([[0.25, 0.5]], dtype=Float)
    assert float(model_value(M, b, x)[0]) == pytest.approx(0.5 * (2 * 0.0625 + 0.25) + 0.25 - 1.0, rel=1e-14)
