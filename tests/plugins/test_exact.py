"""The dense Fisher: equal to the autodiff construction, and refused by name and size where it would not fit."""

from __future__ import annotations

import dense
import pytest
import torch
from small_runs import small_config
from torch import nn

from kfac_plugins.approx import ExactConfig
from kfac_plugins.approx.exact import DenseMoment, Exact
from kfacore import KFAC
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import NumericalError, UnsupportedModelError
from kfacore.lab.training.describe import describe
from kfacore.lab.training.loop import train
from kfacore.registry import get_registry
from kfacore.roles.moment import Moments

SIZES = (4, 3, 2)


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian"])
def test_with_the_exact_estimator_it_is_the_fisher_from_autodiff(likelihood: str) -> None:
    model, x = dense.net(SIZES), dense.randn(6, 4)
    y = torch.zeros(6, dtype=torch.long) if likelihood == "categorical" else torch.full((6, 2), 0.5, dtype=dense.Float)
    wanted = dense.fisher(model, likelihood, x)
    optimizer = KFAC(
        model,
        likelihood=likelihood,
        approx="exact",
        estimator={"kind": "exact", "tau1": 1.0},
        damping={"kind": "fixed", "lambda0": 0.09},
        weight_decay=0.0,
    )
    optimizer.step(x, y)
    assert optimizer.preconditioner is not None
    (found,) = optimizer.preconditioner.moments[DenseMoment]
    assert dense.relative(found, wanted) < 1e-12
    inverse = optimizer.preconditioner.inverse
    assert inverse is not None
    damped = wanted + 0.09 * torch.eye(len(wanted), dtype=dense.Float)
    assert dense.relative(inverse.dense(inverse=False), damped) < 1e-12
    assert dense.relative(inverse.dense(), torch.linalg.inv(damped)) < 1e-10
    for which in (True, False):  # `dense` of the base class probes solve and multiply column by column
        assert dense.relative(super(type(inverse), inverse).dense(inverse=which), inverse.dense(inverse=which)) < 1e-12


def test_passes_are_summed_and_averages_run() -> None:
    model = dense.net(SIZES)
    moments = Moments(Exact.moments, dense.infos(model), dense.randn(1))
    wanted = torch.zeros(0)
    for k in (1, 2, 3):
        samples = dense.case_samples(model, dense.randn(5, 4, seed=k), dense.randn(3, 5, 2, seed=k))
        moments.update(samples, 0.5)
        cases = [(p, n) for p in range(3) for n in range(5)]
        rows = [dense.vec([torch.outer(s.gradients[p, n], s.inputs[n]) for s in samples]) for p, n in cases]
        estimate = sum(torch.outer(row, row) for row in rows) / 5
        wanted = estimate if k == 1 else 0.5 * wanted + 0.5 * estimate
    assert dense.relative(moments[DenseMoment][0], wanted) < 1e-13


def test_it_couples_layers_that_are_not_adjacent() -> None:
    model, x = dense.net((3, 2, 2, 2)), dense.randn(20, 3)
    optimizer = KFAC(model, likelihood="gaussian", approx="exact")
    optimizer.step(x, dense.randn(20, 2))
    assert optimizer.preconditioner is not None
    assert optimizer.preconditioner.inverse is not None
    matrix = optimizer.preconditioner.inverse.dense(inverse=False)
    assert float(matrix[:8, -6:].abs().max()) > 1e-3


def test_a_large_net_is_refused_by_name_and_size_before_anything_is_made() -> None:
    model = nn.Sequential(nn.Linear(784, 1000), nn.Sigmoid(), nn.Linear(1000, 10))
    message = (
        r"this net has 795,010, which would be 632,040,900,100 entries, and the limit is 4,096; its largest layers are "
        r"0 \(1000 x 785 = 785,000\), 2 \(10 x 1001 = 10,010\)\. Use approx = 'blockdiag'"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        KFAC(model, likelihood="categorical", approx="exact")
    with pytest.raises(UnsupportedModelError, match="795,010"):
        Preconditioner(Exact(), dense.infos(model), torch.zeros(()), 0.95)
    Exact(ExactConfig(max_parameters=800_000)).check_layers(dense.infos(model))


def test_the_limit_is_an_option_and_a_run_is_refused_before_its_folder_exists(tmp_path) -> None:
    small = small_config(tmp_path, "approx.kind='exact'", "approx.max_parameters=338", "steps=2")
    with pytest.raises(UnsupportedModelError, match="this net has 339"):
        train(small, registry=get_registry(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnsupportedModelError, match="this net has 339"):  # --dry-run says so too
        describe(small, get_registry())
    enough = small_config(tmp_path, "approx.kind='exact'", "approx.max_parameters=339", "steps=2")
    assert train(enough, registry=get_registry(), out=tmp_path / "run").step == 2
    assert describe(enough, get_registry()).factor_entries == 339**2


def test_the_layer_of_a_nan_is_named() -> None:
    model, x = dense.net((3, 2, 2)), dense.randn(5, 3)
    samples = dense.case_samples(model, x, dense.randn(1, 5, 2))
    samples[1].inputs[2, 0] = torch.nan
    moments = Moments(Exact.moments, dense.infos(model), dense.randn(1))
    moments.update(samples, 0.95)
    with pytest.raises(NumericalError, match=r"^2: the Fisher has NaN"):
        Exact().factorise(moments).damped(torch.tensor(0.1, dtype=dense.Float))


def test_an_indefinite_matrix_gets_jitter_and_a_notice() -> None:
    model = dense.net((2, 2))
    moments = Moments(Exact.moments, dense.infos(model), dense.randn(1))
    moments[DenseMoment][0].copy_(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1e-9], dtype=dense.Float)))
    inverse = Exact().factorise(moments).damped(torch.tensor(1e-8, dtype=dense.Float))
    assert [notice.layer for notice in inverse.notices] == ["all layers"]
    assert bool(torch.isfinite(inverse.dense()).all())


def test_one_step_solves_least_squares() -> None:
    x, y = dense.randn(30, 4), dense.randn(30, 2, seed=1)
    model = dense.net((4, 2))
    optimizer = KFAC(
        model,
        likelihood="gaussian",
        approx="exact",
        estimator={"kind": "exact", "tau1": 1.0},
        damping={"kind": "fixed", "lambda0": 1e-12},
        momentum={"kind": "quadratic-model", "tau2": 1.0},
        weight_decay=0.0,
    )
    report = optimizer.step(x, y)
    homogeneous = torch.cat([x, torch.ones(30, 1, dtype=x.dtype)], 1)
    wanted = torch.linalg.lstsq(homogeneous, y).solution
    assert dense.relative(dense.theta(model), wanted.reshape(-1)) < 1e-9
    assert abs(float(report.alpha) - 1.0) < 1e-9
