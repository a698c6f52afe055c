"""Estimators against the exact Fisher: what they average to, by layer and across layers."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.estimators import EmpiricalConfig, ExactConfig, MonteCarloConfig
from kfac_plugins.estimators.empirical import Empirical
from kfac_plugins.estimators.exact import Exact
from kfac_plugins.estimators.monte_carlo import MonteCarlo
from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.network import Linearizer
from kfacore.roles import Estimator, LayerSamples, Likelihood
from kfacore.roles.samples import mean_diagonal

LIKELIHOODS = {"bernoulli": Bernoulli, "categorical": Categorical, "gaussian": Gaussian}
SIZES = (3, 4, 3)
Float = torch.float64


def targets(likelihood: str, n: int) -> Tensor:
    if likelihood == "categorical":
        return torch.arange(n) % SIZES[-1]
    y = dense.randn(n, SIZES[-1], seed=8)
    return y.sigmoid() if likelihood == "bernoulli" else y


def collect(
    estimator: Estimator, model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, seed: int = 0
) -> list[LayerSamples]:
    batch = Linearizer(model)(x, estimator.cases(len(x)))
    return batch.samples(estimator, y, likelihood, torch.Generator().manual_seed(seed))


def per_case_gradients(samples: list[LayerSamples]) -> Tensor:
    """vec of g abar^T of each pass and case, (k, n, P)."""
    parts = [torch.einsum("kno,ni->knio", s.gradients, s.inputs).flatten(2) for s in samples]
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_is_the_fisher(likelihood: str) -> None:
    model, x = dense.net(SIZES), dense.randn(8, 3)
    found = collect(Exact(ExactConfig(tau1=1.0)), model, x, targets(likelihood, 8), LIKELIHOODS[likelihood]())
    v = per_case_gradients(found)
    F = torch.einsum("knp,knq->pq", v, v) / len(x)
    assert dense.relative(F, dense.fisher(model, likelihood, x)) < 1e-10


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_mean_diagonal_is_that_of_the_fisher(likelihood: str) -> None:
    """tr F / P, whatever the number of passes."""
    model, x = dense.net(SIZES), dense.randn(8, 3)
    samples = collect(Exact(ExactConfig(tau1=1.0)), model, x, targets(likelihood, 8), LIKELIHOODS[likelihood]())
    F = dense.fisher(model, likelihood, x)
    assert float(mean_diagonal(samples)) == pytest.approx(float(F.diagonal().mean()), rel=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_averages_to_the_fisher(likelihood: str) -> None:
    """Every entry of a mean over many draws lies within 5 standard errors of the exact Fisher."""
    repeats, cases = 20_000, 2
    model, x = dense.net(SIZES), dense.randn(cases, 3)
    many = x.repeat(repeats, 1)
    estimator = MonteCarlo(MonteCarloConfig(tau1=1.0))
    found = collect(estimator, model, many, targets(likelihood, len(many)), LIKELIHOODS[likelihood]())
    v = per_case_gradients(found)[0].view(repeats, cases, -1)
    exact = dense.fisher(model, likelihood, x)
    outer = torch.einsum("ncp,ncq->npq", v, v) / cases  # one independent estimate a repeat
    mean, error = outer.mean(0), outer.std(0) / repeats**0.5
    # entries that are the same for every draw have no spread; rounding is all that is left
    assert bool(((mean - exact).abs() <= 5 * error + 1e-10 * exact.abs().max()).all())
    assert float(error.mean()) < 0.05 * float(exact.diagonal().mean())  # the bound above says something
    assert float((mean - exact).abs().max()) > 1e-6  # and these were draws


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_never_sees_the_training_targets(likelihood: str) -> None:
    model, x = dense.net(SIZES), dense.randn(16, 3)
    estimator, rule = MonteCarlo(), LIKELIHOODS[likelihood]()
    y = targets(likelihood, 16)
    a = collect(estimator, model, x, y, rule, seed=3)
    b = collect(estimator, model, x, y.roll(1, 0), rule, seed=3)
    c = collect(estimator, model, x, y, rule, seed=4)
    assert all(torch.equal(s.gradients, t.gradients) for s, t in zip(a, b, strict=True))
    if likelihood == "gaussian":  # discrete draws of two cases may coincide
        assert not torch.equal(a[0].gradients, c[0].gradients)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_is_its_definition_and_not_the_fisher(likelihood: str) -> None:
    model, x = dense.net(SIZES), dense.randn(8, 3)
    y, rule = targets(likelihood, 8), LIKELIHOODS[likelihood]()
    found = collect(Empirical(EmpiricalConfig(tau1=1.0)), model, x, y, rule)
    v = per_case_gradients(found)[0]
    F = torch.einsum("np,nq->pq", v, v) / len(x)
    J = dense.jacobian(model, x)
    z = model(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(rule.nll(z, y).sum(), z)
    by_case = torch.einsum("nop,no->np", J, dz)
    assert dense.relative(F, by_case.T @ by_case / len(x)) < 1e-10
    assert dense.relative(F, dense.fisher(model, likelihood, x)) > 0.05


@pytest.mark.parametrize("kind", [MonteCarlo, Empirical, Exact])
def test_only_the_first_cases_are_used(kind: type[Estimator]) -> None:
    """ceil(tau_1 m) of them, the others may be anything."""
    model, x = dense.net(SIZES), dense.randn(20, 3)
    y = targets("gaussian", 20)
    estimator = kind(kind.Config(kind=kind.Config.model_fields["kind"].default, tau1=0.125))
    a = collect(estimator, model, x, y, Gaussian())
    x, y = x.clone(), y.clone()
    x[3:], y[3:] = 5.0, -5.0
    b = collect(estimator, model, x, y, Gaussian())
    for s, t in zip(a, b, strict=True):
        assert s.cases == t.cases == 3
        assert torch.equal(s.inputs, t.inputs)
        assert torch.equal(s.gradients, t.gradients)


@pytest.mark.parametrize(
    ("tau1", "batch", "cases"), [(0.125, 1000, 125), (0.25, 103, 26), (1.0, 7, 7), (0.125, 1, 1), (0.7, 10, 7)]
)
def test_number_of_cases(tau1: float, batch: int, cases: int) -> None:
    assert MonteCarlo(MonteCarloConfig(tau1=tau1)).cases(batch) == cases


def test_exact_needs_one_pass_an_output_and_the_others_one() -> None:
    model, x = dense.net(SIZES), dense.randn(8, 3)
    y = targets("bernoulli", 8)
    for kind, passes in ((Exact, 3), (MonteCarlo, 1), (Empirical, 1)):
        found = collect(kind(), model, x, y, Bernoulli())
        assert {s.gradients.shape[0] for s in found} == {passes}


def test_draws_are_reproducible_and_move_the_generator() -> None:
    model, x = dense.net(SIZES), dense.randn(8, 3)
    generator = torch.Generator().manual_seed(0)
    batch = Linearizer(model)(x)
    first = batch.samples(MonteCarlo(), x, Gaussian(), generator)
    second = batch.samples(MonteCarlo(), x, Gaussian(), generator)
    again = batch.samples(MonteCarlo(), x, Gaussian(), torch.Generator().manual_seed(0))
    assert torch.equal(first[0].gradients, again[0].gradients)
    assert not torch.equal(first[0].gradients, second[0].gradients)
