"""Steps on the quadratic model, against dense curvature, dense solves and the best point of a Krylov space."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfacore import KFAC
from kfacore.errors import ConfigError, NumericalError
from kfacore.network import BlockVector, Linearizer
from kfacore.optim.local import LocalModel
from kfacore.registry import get_registry

SIZES = (4, 5, 3)
CASES = 12
DAMPING = 0.07
Float = torch.float64


def data(n: int = CASES, seed: int = 0) -> tuple[Tensor, Tensor]:
    return dense.randn(n, SIZES[0], seed=seed), dense.randn(n, SIZES[-1], seed=seed + 70).sigmoid()


def flat(vector: BlockVector) -> Tensor:
    return dense.vec(vector.blocks)


class Problem:
    """The model on the first n cases with a gradient of any kind, and the same thing dense."""

    def __init__(self, n: int, statistics: int) -> None:
        net = dense.net(SIZES)
        x, _ = data()
        self.layers = dense.infos(net)
        linearizer = Linearizer(net)
        batch = linearizer(x, statistics, None, n)
        self.zero = BlockVector.zeros(linearizer.layers)
        self.g = dense.randn(len(dense.theta(net)), seed=5)
        self.F = dense.fisher(net, "bernoulli", x[:n])
        self.A = self.F + DAMPING * torch.eye(len(self.F), dtype=Float)
        damping = torch.tensor(DAMPING, dtype=Float)
        self.local = LocalModel(batch, Bernoulli(), self.vector(self.g), damping, 0.0, n)

    def vector(self, values: Tensor) -> BlockVector:
        fresh = BlockVector(self.zero.layers, torch.zeros_like(self.zero.flat))
        return fresh.copy_blocks(dense.unvec(values, self.layers))

    def push(self, v: BlockVector) -> Tensor:
        return self.local.push([v])[0]


@pytest.mark.parametrize("n", [1, 5, CASES])
@pytest.mark.parametrize("statistics", [1, 4, CASES])
def test_the_gradient_of_the_model(n: int, statistics: int) -> None:
    """On cases that end inside, before or after the statistics' ones; as often as asked."""
    problem = Problem(n, statistics)
    for seed in (1, 2):
        delta = problem.vector(dense.randn(len(problem.g), seed=seed))
        found = problem.local.gradient_at(delta, problem.push(delta), problem.vector(dense.randn(len(problem.g))))
        assert dense.relative(flat(found), problem.A @ flat(delta) + problem.g) < 1e-10


def steps(problem: Problem, momentum: str, times: int, P: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Where `times` further steps lead from a start, with P for F-hat^-1, and the change of the model they name."""

    class Dense:
        def solve_into(self, blocks: list[Tensor], out: list[Tensor]) -> None:
            torch._foreach_copy_(out, dense.unvec(P @ dense.vec(blocks), problem.layers))

    rule = KFAC(dense.net(SIZES), likelihood="bernoulli", momentum=momentum).momentum
    delta = problem.vector(start)
    buffers = [problem.vector(torch.zeros_like(start)) for _ in range(3)]
    inverse: Any = Dense()
    change = problem.local.go_on(delta, problem.push(delta), inverse, rule, times, buffers)
    return flat(delta), float(change)


@pytest.mark.parametrize("times", [1, 2, 3, 6])
def test_steps_with_exact_coefficients_are_the_best_of_their_krylov_space(times: int) -> None:
    """From -alpha P g on, t more steps minimise the model on the span of P g, (P A) P g, ..., t + 1 vectors."""
    problem = Problem(CASES, 4)
    A, g = problem.A, problem.g
    root = dense.randn(len(g), len(g), seed=8)
    P = root @ root.T / len(g) + torch.eye(len(g), dtype=Float)
    first = -P @ g
    start = -(g @ first) / (first @ A @ first) * first
    found, change = steps(problem, "quadratic-model", times, P, start)
    basis = [first / first.norm()]
    for _ in range(times):
        basis.append(torch.linalg.qr(torch.stack([*basis, P @ A @ basis[-1]], 1))[0][:, -1])
    V = torch.stack(basis, 1)
    best = -V @ torch.linalg.solve(V.T @ A @ V, V.T @ g)

    def model(d: Tensor) -> float:
        return float(0.5 * d @ A @ d + g @ d)

    assert dense.relative(found, best) < 1e-8
    assert change == pytest.approx(model(found) - model(start), rel=1e-9)
    assert change < 0


def test_many_steps_solve_the_model() -> None:
    problem = Problem(CASES, 4)
    P = torch.eye(len(problem.g), dtype=Float)
    found, _ = steps(problem, "quadratic-model", 80, P, 0.1 * dense.randn(len(problem.g), seed=3))
    assert dense.relative(found, -torch.linalg.solve(problem.A, problem.g)) < 1e-6


def test_the_search_ends_where_it_is_enough() -> None:
    problem, seen = Problem(CASES, 4), []
    rule = get_registry().build("momentum", "quadratic-model")
    P = torch.eye(len(problem.g), dtype=Float)

    class Identity:
        def solve_into(self, blocks: list[Tensor], out: list[Tensor]) -> None:
            for a, b in zip(blocks, out, strict=True):
                b.copy_(a)

    def enough(residual: BlockVector) -> bool:
        seen.append(float(residual.flat.norm()))
        return len(seen) == 3

    delta = problem.vector(0.0 * problem.g)
    buffers = [problem.vector(0.0 * problem.g) for _ in range(3)]
    problem.local.go_on(delta, problem.push(delta), Identity(), rule, 80, buffers, enough)
    wanted, _ = steps(problem, "quadratic-model", 2, P, 0.0 * problem.g)
    assert dense.relative(flat(delta), wanted) < 1e-12
    assert seen[0] == pytest.approx(float(problem.g.norm()), rel=1e-12)
    assert seen[2] == pytest.approx(float((problem.A @ wanted + problem.g).norm()), rel=1e-9)


def test_without_momentum_they_are_steepest_descent() -> None:
    problem = Problem(CASES, 4)
    P, d = torch.eye(len(problem.g), dtype=Float), 0.1 * dense.randn(len(problem.g), seed=3)
    found, _ = steps(problem, "none", 3, P, d)
    for _ in range(3):
        r = problem.A @ d + problem.g
        d = d - (r @ r) / (r @ problem.A @ r) * r
    assert dense.relative(found, d) < 1e-10


# --- in the optimizer --------------------------------------------------------------------------------------------


def optimizer(net: nn.Module, iterations: int, **more: Any) -> KFAC:
    momentum = {"kind": "quadratic-model", "iterations": iterations, "tau2": 1.0, **more}
    return KFAC(net, likelihood="bernoulli", estimator="exact", momentum=momentum, trust="none", weight_decay=1e-2)


def test_a_step_goes_as_far_as_the_model_says() -> None:
    """With many iterations a step is the Newton step -(F + (lambda + eta) I)^-1 grad h, wherever it begins."""
    net = dense.net(SIZES)
    kfac = optimizer(net, 120)
    for k in range(2):
        x, y = data(seed=k)
        theta = dense.theta(net)
        F = dense.fisher(net, "bernoulli", x)
        J = dense.jacobian(net, x)
        b = torch.einsum("nop,no->p", J, net(x).detach().sigmoid() - y) / CASES + 1e-2 * theta
        report = kfac.step(x, y)
        assert report.lam is not None
        assert report.model_value is not None
        A = F + (float(report.lam) + 1e-2) * torch.eye(len(F), dtype=Float)
        newton = -torch.linalg.solve(A, b)
        assert dense.relative(dense.theta(net) - theta, newton) < 1e-6, k
        assert float(report.model_value) == pytest.approx(float(0.5 * b @ newton), rel=1e-8)


def test_small_mini_batches_take_one_iteration() -> None:
    nets = [dense.net(SIZES) for _ in range(3)]
    runs = [optimizer(nets[0], 1), optimizer(nets[1], 3, iterations_from=CASES + 1), optimizer(nets[2], 3)]
    for kfac in runs:
        kfac.step(*data())
    one, small, three = (dense.theta(net) for net in nets)
    assert torch.equal(one, small)
    assert dense.relative(three, one) > 1e-6


def test_a_given_rate_needs_no_model_of_its_own() -> None:
    """Heavy-ball steps on the model: the curvature is needed for their gradients, not for their coefficients."""
    net = dense.net(SIZES)
    momentum = {"kind": "fixed", "lr": 0.1, "mu": 0.5, "iterations": 3, "tau2": 1.0}
    damping = {"kind": "fixed", "lambda0": 0.5, "gamma": 1.0}
    kfac = KFAC(net, likelihood="bernoulli", momentum=momentum, damping=damping, weight_decay=0.0)
    x, y = data()
    theta = dense.theta(net)
    F = dense.fisher(net, "bernoulli", x)
    b = torch.einsum("nop,no->p", dense.jacobian(net, x), net(x).detach().sigmoid() - y) / CASES
    report = kfac.step(x, y)
    assert report.model_value is not None
    assert kfac.preconditioner is not None
    P = kfac.preconditioner.in_use.dense()
    A = F + 0.5 * torch.eye(len(F), dtype=Float)
    d = last = torch.zeros_like(b)
    for _ in range(3):
        last = -0.1 * P @ (A @ d + b) + 0.5 * last
        d = d + last
    assert dense.relative(dense.theta(net) - theta, d) < 1e-9
    assert float(report.model_value) == pytest.approx(float(0.5 * d @ A @ d + b @ d), rel=1e-8)


def test_mixed_precision_waits_for_steps_of_one_iteration() -> None:
    """Conjugate steps need gradients of one precision; small mini-batches still go forward in bfloat16."""
    thetas = []
    for autocast in (None, "bfloat16"):
        net = dense.net(SIZES).float()
        momentum = {"kind": "quadratic-model", "iterations": 2, "iterations_from": CASES}
        damping = {"kind": "levenberg-marquardt", "lambda0": 0.1, "lambda_every": 100}
        kfac = KFAC(net, likelihood="bernoulli", momentum=momentum, damping=damping, trust="none", autocast=autocast)
        whole, (x, y) = [], data()
        kfac.step(x.float(), y.float())
        whole.append(dense.theta(net).clone())
        kfac.step(x[:6].float(), y[:6].float())
        whole.append(dense.theta(net).clone())
        thetas.append(whole)
    assert torch.equal(thetas[0][0], thetas[1][0])
    assert not torch.equal(thetas[0][1], thetas[1][1])


def test_steps_that_are_not_finite_move_nothing_in_a_refresh_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the parameters nor the previous step, so that the next mini-batch starts from where this one did."""
    kfac = optimizer(dense.net(SIZES), 3)
    kfac.step(*data())
    assert kfac._directions.delta is not None
    before, delta = dense.theta(kfac.model).clone(), kfac._directions.delta.flat.clone()
    original = LocalModel.go_on

    def overflow(self: LocalModel, further: BlockVector, *given: Any) -> Tensor:
        return original(self, further, *given) + further.flat.fill_(torch.inf)[0]

    monkeypatch.setattr(LocalModel, "go_on", overflow)
    with pytest.raises(NumericalError, match="step 2: the quadratic model is not finite"):
        kfac.step(*data(seed=1))
    assert torch.equal(dense.theta(kfac.model), before)
    assert torch.equal(kfac._directions.delta.flat, delta)


@pytest.mark.parametrize(("key", "value"), [("iterations", 0), ("iterations", 1.5), ("iterations_from", 0)])
def test_wrong_options(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"momentum\.{key}"):
        KFAC(dense.net(SIZES), likelihood="bernoulli", momentum={"kind": "quadratic-model", key: value})
