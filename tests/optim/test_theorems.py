"""The paper's theorems, in double precision, and the conditions without which each fails."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from dense import Float, Kronecker, net, randn, relative, tridiagonal_inverse, unvec, vec
from torch import nn

from kfacore import KFAC
from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.lab.diagnostics.cumulants import cumulant_report
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.diagnostics.invariance import (
    Transform,
    TransformedChain,
    agreement,
    function_path,
    logistic_twin,
    random_transform,
    whitening,
)
from kfacore.registry import get_registry
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments

APPROXIMATIONS = ("blockdiag", "tridiag")
SIZES = (5, 4, 3, 4)
FREE = {"damping": {"kind": "fixed", "lambda0": 0.0}, "weight_decay": 0.0, "estimator": {"kind": "exact", "tau1": 1.0}}
EXACT = 1e-8
"""Rounding: undamped factors have condition numbers of 1e3 to 1e5, and steps multiply errors."""


def problem(
    cases: int = 60, sizes: tuple[int, ...] = SIZES, **more: object
) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    model = net(sizes, **more)  # type: ignore[arg-type]
    x = randn(cases, sizes[0], seed=1)
    y = torch.sigmoid(randn(cases, sizes[-1], seed=2))
    return model, x, y


def paths(model, other, x, y, steps, **options):
    options = {"likelihood": "bernoulli", "momentum": "none", **FREE, "seed": 5, **options}
    options["approx"] = {"kind": options["approx"], "refresh_every": 1}
    return agreement(function_path(model, x, y, steps, **options), function_path(other, x, y, steps, **options))


# Theorem 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_theorem_1_one_step_and_a_path_are_invariant(approx, likelihood):
    model, x, y = problem()
    transform = random_transform(model, torch.Generator().manual_seed(3))
    assert all(float((m - m.diag().diag()).abs().max()) > 0.1 for m in (*transform.omega, *transform.phi))  # dense
    found = paths(model, TransformedChain(model, transform), x, y, 5, approx=approx, likelihood=likelihood)
    assert found.start < 1e-12
    assert found.worst < EXACT


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_theorem_1_holds_for_sampled_targets_and_for_momentum_without_damping(approx):
    model, x, y = problem()
    other = TransformedChain(model, random_transform(model, torch.Generator().manual_seed(4)))
    sampled = {"estimator": {"kind": "monte-carlo", "tau1": 1.0}}
    assert paths(model, other, x, y, 3, approx=approx, **sampled).worst < EXACT
    assert paths(model, other, x, y, 5, approx=approx, momentum="quadratic-model").worst < EXACT


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize(
    "broken",
    [
        {"damping": {"kind": "fixed", "lambda0": 0.0, "gamma": 0.1}},  # gamma I is not invariant
        {"damping": {"kind": "fixed", "lambda0": 3.0, "gamma": 1e-9}},  # neither is lambda I in the quadratic model
        {"weight_decay": 0.1, "damping": {"kind": "fixed", "lambda0": 0.0, "gamma": 1e-9}},  # nor eta ||theta||^2
        {"estimator": {"kind": "monte-carlo", "tau1": 0.05}},  # 3 cases: factors without inverse, saved by jitter
    ],
    ids=["gamma", "lambda", "weight decay", "too few cases"],
)
def test_theorem_1_fails_with_damping_or_singular_factors(approx, broken):
    model, x, y = problem()
    other = TransformedChain(model, random_transform(model, torch.Generator().manual_seed(3)))
    assert paths(model, other, x, y, 2, approx=approx, **broken).worst > 1e-3


def test_theorem_1_fails_for_momentum_with_damping_more_than_without_momentum():
    model, x, y = problem()
    other = TransformedChain(model, random_transform(model, torch.Generator().manual_seed(3)))
    damped = {"damping": {"kind": "fixed", "lambda0": 0.3, "gamma": 0.5}, "approx": "blockdiag"}
    assert paths(model, other, x, y, 5, momentum="quadratic-model", **damped).worst > 1e-2


def test_gradient_descent_is_not_invariant():
    model, x, y = problem()
    other = TransformedChain(model, random_transform(model, torch.Generator().manual_seed(3)))
    one_sided = [(p, descend(m, x, y)) for m in (model, other) for p in [m(x).detach()]]
    (before, after), (_, after_other) = one_sided
    assert float((after_other - after).norm() / (after - before).norm()) > 0.1


def test_a_wrong_transform_is_noticed():
    """Omega on the activities without its inverse in the weights computes another function: the measure must see it."""
    model, x, y = problem()
    other = TransformedChain(model, random_transform(model, torch.Generator().manual_seed(3)))
    with torch.no_grad():
        other.linears[1].weight.mul_(1.01)
    found = paths(model, other, x, y, 1, approx="blockdiag")
    assert found.start > 1e-4
    assert found.first > 1e-4


# Corollary 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_corollary_2_tanh_and_logistic_nets_follow_the_same_path(approx):
    model, x, y = problem(hidden=nn.Tanh)
    twin = logistic_twin(model)
    assert sum(isinstance(m, nn.Sigmoid) for m in twin.modules()) == 2
    assert not any(isinstance(m, nn.Tanh) for m in twin.modules())
    found = paths(model, twin, x, y, 20, approx=approx)
    assert found.start < 1e-12
    assert found.worst < 1e-6
    damped = paths(model, twin, x, y, 20, approx=approx, damping={"kind": "fixed", "lambda0": 0.0, "gamma": 0.1})
    assert damped.first > 1e-3


# Corollary 3 ---------------------------------------------------------------------------------------------------------


def descend(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rate: float = 0.1) -> torch.Tensor:
    """Outputs after one step of plain gradient descent, with autograd and nothing else."""
    model = copy.deepcopy(model)
    loss = nn.functional.binary_cross_entropy_with_logits(model(x), y, reduction="sum") / len(x)
    with torch.no_grad():
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter -= rate * gradient
        return model(x)


def test_corollary_3_the_block_diagonal_update_is_gradient_descent_in_the_white_net():
    model, x, y = problem()
    likelihood = get_registry().build("likelihood", "bernoulli")
    samples = ExactModel(model, likelihood, x, y).exact_samples()
    white = TransformedChain(model, whitening(samples))

    inside = ExactModel(white, likelihood, x, y).exact_samples()
    for sample in inside:
        a, g = sample.inputs, sample.gradients.flatten(0, 1)
        torch.testing.assert_close(a[:, :-1].mean(0), torch.zeros(a.shape[1] - 1, dtype=Float), atol=1e-10, rtol=0)
        torch.testing.assert_close(a.T @ a / len(a), torch.eye(a.shape[1], dtype=Float), atol=1e-10, rtol=0)
        torch.testing.assert_close(g.T @ g / len(a), torch.eye(g.shape[1], dtype=Float), atol=1e-10, rtol=0)

    def step(approx: str) -> torch.Tensor:
        trained = copy.deepcopy(model)
        options = {**FREE, "momentum": {"kind": "fixed", "lr": 0.1, "mu": 0.0}}
        KFAC(trained, likelihood="bernoulli", approx={"kind": approx, "power": 1.0}, **options).step(x, y)
        with torch.no_grad():
            return trained(x)

    start, descended = model(x).detach(), descend(white, x, y)
    moved = (descended - start).norm()
    assert float((step("blockdiag") - descended).norm() / moved) < 1e-9
    # Neither the other approximation nor descent in any other net is the same.
    assert float((step("tridiag") - descended).norm() / moved) > 1e-2
    scaled = Transform(tuple(2.0 * m for m in whitening(samples).omega), whitening(samples).phi)
    assert float((descend(TransformedChain(model, scaled), x, y) - descended).norm() / moved) > 0.5


# The block-tridiagonal inverse ----------------------------------------------------------------------------------------


def chain_factors(widths: list[int], seed: int) -> list[list[torch.Tensor]]:
    """Second moments of a Gaussian chain u_1 - ... - u_L: given its neighbours, u_i is independent of the rest."""
    count = len(widths)
    diagonal, cross = [], []
    for i, width in enumerate(widths):
        root = randn(width, width + 3, seed=seed + i)
        diagonal.append(root @ root.T / width)
    for i, (a, b) in enumerate(pairwise(widths)):
        mix = randn(a, b, seed=seed + 50 + i) * 0.25
        cross.append(torch.linalg.cholesky(diagonal[i]) @ mix @ torch.linalg.cholesky(diagonal[i + 1]).T)
    X = [[diagonal[i] for _ in range(count)] for i in range(count)]
    for i in range(count):
        forward = None
        for j in range(i + 1, count):
            forward = cross[i] if forward is None else forward @ torch.linalg.inv(diagonal[j - 1]) @ cross[j - 1]
            X[i][j], X[j][i] = forward, forward.T
    return X


def tridiagonal_of(factors: Kronecker, layers: list[Block]) -> torch.Tensor:
    moments = Moments((InputFactor, OutputFactor, InputCross, OutputCross), layers, factors.A[0][0])
    for kind, pairs in ((InputFactor, factors.A), (OutputFactor, factors.G)):
        for i, value in enumerate(moments[kind]):
            value.copy_(pairs[i][i])
    for cross, pairs in ((InputCross, factors.A), (OutputCross, factors.G)):
        for i, value in enumerate(moments[cross]):
            value.copy_(pairs[i][i + 1])
    inverse = get_registry().build("approx", "tridiag").factorise(moments).damped(torch.tensor(0.0, dtype=Float))
    assert inverse.notices == ()
    return inverse.dense()


def test_the_tridiagonal_inverse_is_exact_on_a_chain_structured_gaussian():
    layers = [
        Block(str(i), d_in, d_out, bias=False) for i, (d_in, d_out) in enumerate([(3, 4), (4, 2), (2, 3), (3, 3)])
    ]
    factors = Kronecker(chain_factors([3, 4, 2, 3], 0), chain_factors([4, 2, 3, 3], 300))
    F = factors.matrix()
    assert float(torch.linalg.eigvalsh(F)[0]) > 0
    exact = torch.linalg.inv(F)
    sizes = [layer.size for layer in layers]
    first, last = slice(0, sizes[0]), slice(sum(sizes[:2]), sum(sizes))
    assert float(exact[first, last].abs().max()) < 1e-10 * float(exact.abs().max())  # block-tridiagonal
    assert float(F[first, last].abs().max()) > 1e-3 * float(F.abs().max())  # which F itself is not
    found = tridiagonal_of(factors, layers)
    assert relative(found, exact) < 1e-11
    blocks = unvec(randn(sum(sizes), seed=9), layers)
    assert relative(found @ vec(blocks), torch.linalg.solve(F, vec(blocks))) < 1e-10

    # One edge that skips a layer breaks the assumption; the inverse of the remaining chain stays what it was.
    factors.A[0][2] = -factors.A[0][2]
    factors.A[2][0] = factors.A[0][2].T
    broken = torch.linalg.inv(factors.matrix())
    assert float(torch.linalg.eigvalsh(factors.matrix())[0]) > 0
    assert relative(found, broken) > 1e-3
    torch.testing.assert_close(tridiagonal_of(factors, layers), found)
    torch.testing.assert_close(found, tridiagonal_inverse(factors))


# Section 3.1 ---------------------------------------------------------------------------------------------------------


def test_equation_3_needs_gradients_of_the_models_own_distribution():
    model, x, y = problem()
    exact = ExactModel(model, get_registry().build("likelihood", "bernoulli"), x, y)
    assert cumulant_report(exact.exact_samples()).mismatch < 1e-10
    assert cumulant_report(exact.empirical_samples(), centred=False).mismatch > 0.05
