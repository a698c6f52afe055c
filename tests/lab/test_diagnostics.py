"""Diagnostics against the dense reference, which is written from autodiff and calls none of this code."""

from __future__ import annotations

import pytest
import torch
from dense import (
    Float,
    Kronecker,
    block_diagonal,
    case_samples,
    fisher,
    infos,
    net,
    randn,
    relative,
    theta,
    tridiagonal_inverse,
    unvec,
    vec,
)
from torch import nn

from kfacore.errors import ConfigError, DataError, NumericalError, UnsupportedModelError
from kfacore.lab.diagnostics.cumulants import cumulant_report
from kfacore.lab.diagnostics.dense import (
    FactorPairs,
    block_average,
    block_mask,
    compare,
    exact_fisher,
    inverse_of,
    stack,
)
from kfacore.lab.diagnostics.exact import ExactModel, dot
from kfacore.lab.diagnostics.natural import natural_gradient
from kfacore.lab.diagnostics.quality import gamma_grid, inverses, measure_update
from kfacore.registry import get_registry

SIZES = (4, 5, 3, 4)
LIKELIHOODS = ("bernoulli", "categorical", "gaussian")


def likelihood_of(name):
    return get_registry().build("likelihood", name)


def targets_of(name, cases):
    if name == "categorical":
        return torch.arange(cases) % SIZES[-1]
    return torch.sigmoid(randn(cases, SIZES[-1], seed=2))


def exact_of(name="bernoulli", cases=20, **options):
    model, x = net(SIZES), randn(cases, SIZES[0], seed=1)
    return ExactModel(model, likelihood_of(name), x, targets_of(name, cases), **options), model, x


# The exact model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_fisher_and_curvature_are_the_autodiff_matrix(name):
    exact, model, x = exact_of(name, lam=0.3, weight_decay=0.1)
    F = fisher(model, name, x)
    v = unvec(randn(len(F), seed=3), exact.layers)
    assert relative(stack(exact.fisher(v)), F @ vec(v)) < 1e-12
    assert relative(stack(exact.curvature(v)), F @ vec(v) + 0.4 * vec(v)) < 1e-12
    assert exact.quadratic_form(v) == pytest.approx(float(vec(v) @ (F @ vec(v) + 0.4 * vec(v))), rel=1e-12)
    assert relative(exact_fisher(exact.exact_samples()), F) < 1e-10
    torch.testing.assert_close(exact.outputs(), model(x).detach())
    torch.testing.assert_close(stack(exact.theta()), theta(model))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradient_and_objective_are_autograds(name):
    exact, model, x = exact_of(name, weight_decay=0.1)
    y = targets_of(name, 20)

    def objective(m):
        penalty = sum(p.square().sum() for p in m.parameters())
        return likelihood_of(name).nll(m(x), y).mean() + 0.05 * penalty

    value = objective(model)
    parts = torch.autograd.grad(value, list(model.parameters()))
    blocks = [torch.cat([w, b[:, None]], dim=1) for w, b in zip(parts[::2], parts[1::2], strict=True)]
    assert exact.objective == pytest.approx(float(value.detach()), rel=1e-13)
    assert relative(stack(exact.gradient()), vec(blocks)) < 1e-12

    delta = unvec(0.1 * randn(exact.parameters, seed=4), exact.layers)
    with torch.no_grad():
        for layer, block in zip(model[::2], delta, strict=True):
            layer.weight += block[:, :-1]
            layer.bias += block[:, -1]
    before = exact.fisher(delta)
    assert exact.objective_at(delta) == pytest.approx(float(objective(model).detach()), rel=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(before, exact.fisher(delta), strict=True))  # still where it was


def test_the_callers_model_is_left_alone_and_single_precision_is_welcome():
    model = net(SIZES).float()
    x = randn(20, SIZES[0], seed=1).float()
    exact = ExactModel(model, likelihood_of("bernoulli"), x, targets_of("bernoulli", 20).float())
    assert exact.gradient()[0].dtype == Float
    assert next(model.parameters()).dtype == torch.float32
    model.double()
    assert relative(exact_fisher(exact.exact_samples()), fisher(model, "bernoulli", x.double())) < 1e-10


def test_samples_of_the_other_estimators():
    exact, model, x = exact_of(cases=200)
    drawn = exact_fisher(exact.monte_carlo_samples(torch.Generator().manual_seed(0), passes=200))
    assert relative(drawn, fisher(model, "bernoulli", x)) < 0.05
    residuals = torch.sigmoid(model(x).detach()) - targets_of("bernoulli", 200)
    wanted = case_samples(model, x, residuals[None])
    found = exact.empirical_samples()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs)
        torch.testing.assert_close(a.gradients, b.gradients)


def test_mistakes_are_named():
    model, x = net(SIZES), randn(6, SIZES[0])
    with pytest.raises(DataError, match="5 targets for 6 examples"):
        ExactModel(model, likelihood_of("gaussian"), x, randn(5, SIZES[-1]))
    with pytest.raises(NumericalError, match="not finite"):
        ExactModel(model, likelihood_of("gaussian"), x * torch.inf, randn(6, SIZES[-1]))
    with pytest.raises(UnsupportedModelError, match="no trainable parameters"):
        ExactModel(nn.Tanh(), likelihood_of("gaussian"), x, randn(6, 4))


# The natural gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_natural_gradient_is_the_dense_solution(name, preconditioned):
    exact, model, x = exact_of(name, lam=1e-3, weight_decay=1e-5)
    g = exact.gradient()
    F = fisher(model, name, x)
    wanted = torch.linalg.solve(F + (1e-3 + 1e-5) * torch.eye(len(F), dtype=Float), vec(g))
    inverse = None
    if preconditioned:
        approx = get_registry().build("approx", "blockdiag")
        [(_, inverse)] = inverses(approx, exact.layers, exact.exact_samples(), [0.03])
    found = natural_gradient(exact, preconditioner=inverse, tolerance=1e-10)
    assert relative(stack(found.blocks), wanted) < 1e-6
    assert found.converged
    assert found.residual < 1e-9
    assert found.damping == pytest.approx(1e-3 + 1e-5)
    assert found.cases == 20
    assert found.decrease == pytest.approx(0.5 * float(vec(g) @ wanted), rel=1e-6)


def test_a_preconditioner_saves_iterations():
    exact, _, _ = exact_of("gaussian", cases=200, lam=1e-4)
    [(_, inverse)] = inverses(get_registry().build("approx", "tridiag"), exact.layers, exact.exact_samples(), [1e-2])
    plain = natural_gradient(exact)
    helped = natural_gradient(exact, preconditioner=inverse)
    assert helped.iterations < plain.iterations


def test_a_search_that_ends_early_says_so():
    exact, _, _ = exact_of(lam=1e-6)
    found = natural_gradient(exact, max_iterations=2)
    assert found.iterations == 2
    assert not found.converged
    residual = stack(exact.curvature(found.blocks)) - stack(exact.gradient())
    assert found.residual == pytest.approx(float(residual.norm() / stack(exact.gradient()).norm()))


def test_zero_gradient_and_bad_options():
    exact, _, _ = exact_of()
    found = natural_gradient(exact, exact.zeros())
    assert found.iterations == 0
    assert found.converged
    assert dot(found.blocks, found.blocks) == 0.0
    with pytest.raises(ConfigError, match="tolerance > 0"):
        natural_gradient(exact, tolerance=0.0)


def test_directions_without_curvature_end_the_search():
    """One case and no damping: the Fisher has rank 4; the gradient lies in its range, a random vector does not."""
    exact, _, _ = exact_of("gaussian", cases=1)
    inside = natural_gradient(exact, tolerance=1e-9)
    assert inside.converged
    outside = natural_gradient(exact, unvec(randn(exact.parameters), exact.layers), tolerance=1e-9, max_iterations=50)
    assert not outside.converged
    assert outside.residual > 0.1


# Dense matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_f_tilde_and_every_approximation_agree_with_autodiff(name):
    exact, model, x = exact_of(name)
    with torch.no_grad():
        vectors = likelihood_of(name).fisher_sqrt(model(x))
    reference = Kronecker.of(case_samples(model, x, vectors))
    samples = exact.exact_samples()
    pairs = FactorPairs.of(samples)
    assert relative(pairs.matrix(), reference.matrix()) < 1e-10
    assert pairs.sizes() == [layer.size for layer in infos(model)]
    for pi in ("layer", "net", None):
        damped = reference.damped(0.1, pi=pi)
        assert relative(pairs.damped(0.1, pi=pi).matrix(), damped.matrix()) < 1e-10
        wanted = {
            "blockdiag": torch.linalg.inv(block_diagonal(damped)),
            "tridiag": tridiagonal_inverse(damped),
        }
        for kind, dense in wanted.items():
            approx = get_registry().build("approx", kind)
            [(gamma, inverse)] = inverses(approx, exact.layers, samples, [0.1], pi=pi)
            assert gamma == 0.1
            assert relative(inverse.dense(), dense) < 1e-10
            assert relative(inverse.dense(inverse=False), torch.linalg.inv(dense)) < 1e-10


def test_a_part_of_the_layers():
    exact, model, x = exact_of()
    samples = exact.exact_samples()[1:]
    first = exact.layers[0].size
    assert relative(exact_fisher(samples), fisher(model, "bernoulli", x)[first:, first:]) < 1e-10
    [(_, inverse)] = inverses(get_registry().build("approx", "tridiag"), exact.layers[1:], samples, [0.2])
    with torch.no_grad():
        vectors = likelihood_of("bernoulli").fisher_sqrt(model(x))
    reference = Kronecker.of(case_samples(model, x, vectors)[1:])
    assert relative(inverse.dense(), tridiagonal_inverse(reference.damped(0.2))) < 1e-10


def test_stacking():
    exact, _, _ = exact_of()
    v = randn(exact.parameters)
    assert torch.equal(stack(unvec(v, exact.layers)), v)


def test_errors_of_a_known_difference():
    Y = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=Float))
    Y[0, 2] = Y[2, 0] = 0.5
    X = Y.clone()
    X[0, 0] += 1.0
    X[0, 2] = X[2, 0] = 0.2
    found = compare(X, Y, [2, 1])
    error, E = X - Y, torch.linalg.svdvals
    assert found.frobenius == pytest.approx(float(error.norm() / Y.norm()))
    assert found.spectral == pytest.approx(float(E(error)[0] / E(Y)[0]))
    assert found.diagonal == pytest.approx(1.0 / 21.0**0.5)
    assert found.off_diagonal == pytest.approx(0.3 / 0.5)
    assert compare(X, Y, [3]).off_diagonal is None
    assert block_mask([1, 2]).int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    torch.testing.assert_close(
        block_average(-X, [2, 1]), torch.tensor([[7.0 / 4, 0.1], [0.1, 1.0]], dtype=Float), rtol=1e-12, atol=0
    )


def test_a_singular_matrix_has_no_inverse():
    with pytest.raises(ConfigError, match="F-tilde has no inverse"):
        inverse_of(torch.ones(3, 3, dtype=Float), "F-tilde")
    M = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=Float)
    torch.testing.assert_close(inverse_of(M, "M") @ M, torch.eye(2, dtype=Float))


# Cumulants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_error_of_f_tilde_is_its_expression_in_cumulants(name):
    exact, _, _ = exact_of(name)
    samples = exact.exact_samples()
    error = (exact_fisher(samples) - FactorPairs.of(samples).matrix()).abs().sum()
    report = cumulant_report(samples)
    assert report.error == pytest.approx(float(error), rel=1e-10)
    assert report.identity == pytest.approx(report.error, rel=1e-10)
    assert report.mismatch < 1e-10
    assert report.error < report.bound < 10 * report.error
    assert 0 < report.fourth < 1


def test_inputs_that_never_change_have_no_error():
    model, x = net(SIZES), torch.ones(6, SIZES[0], dtype=Float)
    report = cumulant_report(ExactModel(model, likelihood_of("gaussian"), x, randn(6, 4)).exact_samples())
    assert report.error < 1e-12


def test_cumulants_of_the_empirical_fisher_follow_the_definition():
    """With the mixed terms the definition of cumulants is an identity of its own: adding them back gives the error."""
    exact, _, _ = exact_of()
    report = cumulant_report(exact.empirical_samples(), centred=False)
    assert report.mismatch > 0.05
    with pytest.raises(ValueError, match="single pass"):
        cumulant_report(exact.exact_samples(), centred=False)


# Quality of updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blockdiag", "tridiag"])
def test_quality_of_an_update_from_dense_matrices(kind):
    exact, model, x = exact_of(lam=0.01, weight_decay=1e-3)
    g, samples = exact.gradient(), exact.exact_samples()
    [(gamma, inverse)] = inverses(get_registry().build("approx", kind), exact.layers, samples, [0.1])
    found = measure_update(exact, g, natural_gradient(exact, tolerance=1e-12), inverse, kind, gamma)

    B = fisher(model, "bernoulli", x)
    B = B + 0.011 * torch.eye(len(B), dtype=Float)
    gradient = vec(g)
    update, natural = -inverse.dense() @ gradient, -torch.linalg.solve(B, gradient)
    best = -0.5 * float(gradient @ natural)

    def decrease(step):
        return -float(0.5 * step @ B @ step + gradient @ step)

    alpha = -float(gradient @ update) / float(update @ B @ update)
    assert found.alpha == pytest.approx(alpha, rel=1e-9)
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(update, natural, dim=0)), rel=1e-9)
    assert found.rescaled == pytest.approx(decrease(alpha * update) / best, rel=1e-9)
    assert found.unscaled == pytest.approx(decrease(update) / best, rel=1e-9)
    assert found.unscaled <= found.rescaled <= 1.0
    gain = exact.objective - exact.objective_at(unvec(alpha * update, exact.layers))
    assert found.improvement_rescaled == pytest.approx(gain, rel=1e-9)


def test_the_natural_gradient_itself_is_the_best():
    exact, _, _ = exact_of(lam=0.01)
    natural = natural_gradient(exact, tolerance=1e-12)

    class Perfect:
        notices = ()

        def solve(self, blocks):
            return natural.blocks

    found = measure_update(exact, exact.gradient(), natural, Perfect(), "perfect", 0.0)
    for value in (found.cosine, found.rescaled, found.unscaled, found.alpha):
        assert value == pytest.approx(1.0, rel=1e-8)


def test_the_grid_of_gammas():
    grid = gamma_grid(0.3, decades=1, per_decade=2)
    assert grid == pytest.approx([0.03, 0.3 / 10**0.5, 0.3, 0.3 * 10**0.5, 3.0])
    assert grid[2] == 0.3


def test_averages_in_an_inverses_coordinates_get_two_rounds():
    from kfacore.curvature.moments import InputFactor, OutputFactor

    seen = []

    class Watching(InputFactor):
        def accumulate(self, values, samples, beta, alpha):
            seen.append("update")
            super().accumulate(values, samples, beta, alpha)

        def refreshed(self, inverse):
            seen.append("refreshed")

    blockdiag = get_registry().build("approx", "blockdiag")

    class Approx(type(blockdiag)):
        moments = (InputFactor, OutputFactor, Watching)

    exact, _, _ = exact_of()
    [(_, inverse)] = inverses(Approx(), exact.layers, exact.exact_samples(), [0.1])
    assert seen == ["update", "refreshed", "update"]
    [(_, plain)] = inverses(blockdiag, exact.layers, exact.exact_samples(), [0.1])
    assert relative(inverse.dense(), plain.dense()) < 1e-12
