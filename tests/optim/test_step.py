"""`KFAC` as people use it: how it is built, what a step does and reports, and what it says to bad input."""

from __future__ import annotations

import math
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.tridiag import BlockTridiagonal
from kfac_plugins.damping import FixedDampingConfig, LevenbergMarquardtConfig
from kfac_plugins.estimators import ExactConfig
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.momentum.none import NoMomentum
from kfacore import KFAC, KFACConfig
from kfacore.errors import ConfigError
from kfacore.roles import StepReport
from kfacore.schema.presets import PRESETS

SIZES = (4, 5, 3)
Float = torch.float64


def data(n: int = 40, seed: int = 0, dtype: torch.dtype = Float) -> tuple[Tensor, Tensor]:
    return dense.randn(n, SIZES[0], seed=seed).to(dtype), dense.randn(n, SIZES[-1], seed=seed + 70).to(dtype)


def labels(n: int = 40) -> Tensor:
    return torch.arange(n) % SIZES[-1]


def train(optimizer: KFAC, steps: int, start: int = 0) -> list[StepReport]:
    return [optimizer.step(*data(seed=start + k)) for k in range(steps)]


# --- how it is built ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "approx", ["tridiag", {"kind": "tridiag"}, BlockTridiagonalConfig(), BlockTridiagonal(), BlockTridiagonalConfig]
)
def test_a_slot_takes_a_name_a_table_a_config_or_an_instance(approx: Any) -> None:
    if isinstance(approx, type):
        with pytest.raises(ConfigError, match="found the class BlockTridiagonalConfig"):
            KFAC(dense.net(SIZES), likelihood="gaussian", approx=approx)
        return
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", approx=approx)
    assert type(optimizer.approx) is BlockTridiagonal
    if isinstance(approx, BlockTridiagonal):
        assert optimizer.approx is approx


def test_all_slots_as_attributes() -> None:
    optimizer = KFAC(
        dense.net(SIZES),
        likelihood=Categorical(),
        approx={"kind": "tridiag", "tolerance": 0.01, "refresh_every": 7},
        estimator=ExactConfig(tau1=0.5),
        damping=FixedDampingConfig(lambda0=2.0),
        momentum=NoMomentum(),
        weight_decay=0.25,
    )
    assert optimizer.likelihood.config.kind == "categorical"
    assert optimizer.approx.config.refresh_every == 7
    assert optimizer.estimator.config.tau1 == 0.5
    assert float(optimizer.damping.lam) == 2.0
    assert optimizer.momentum.config.kind == "none"
    assert optimizer.weight_decay == 0.25
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.model is optimizer.linearizer.model


def test_config_object_is_the_same_as_options() -> None:
    options: dict[str, Any] = {
        "likelihood": "gaussian",
        "approx": "tridiag",
        "estimator": {"kind": "monte-carlo", "tau1": 0.5},
        "damping": FixedDampingConfig(lambda0=0.5),
        "weight_decay": 1e-3,
        "seed": 4,
    }
    models = [dense.net(SIZES), dense.net(SIZES)]
    for optimizer in (KFAC(models[0], KFACConfig(**options)), KFAC(models[1], **options)):
        train(optimizer, 3)
    assert torch.equal(dense.theta(models[0]), dense.theta(models[1]))
    with pytest.raises(ConfigError, match="config or single options, not both; found config and approx"):
        KFAC(models[0], KFACConfig(likelihood="gaussian"), approx="tridiag")


def test_presets_fill_what_is_left_out() -> None:
    default = KFAC(dense.net(SIZES), likelihood="gaussian")
    paper = KFAC(dense.net(SIZES), likelihood="gaussian", preset="paper")
    heskes = KFAC(dense.net(SIZES), likelihood="gaussian", preset="heskes")
    mixed = KFAC(dense.net(SIZES), likelihood="gaussian", preset="paper", momentum="none")
    assert float(paper.damping.lam) == 150.0
    assert paper.momentum.config.tau2 == 1.0
    assert default.damping.config.kind == "levenberg-marquardt"
    assert float(default.damping.lam) < 150.0
    assert heskes.damping.config.pi is None
    assert heskes.estimator.config.kind == "exact"
    assert mixed.momentum.config.kind == "none"
    assert float(mixed.damping.lam) == 150.0
    assert default.weight_decay == 0.0
    assert paper.weight_decay == 1e-5
    assert (default.trust.config.kind, paper.trust.config.kind) == ("undo", "none")


def test_presets_fill_what_a_named_slot_leaves_out() -> None:
    """As in `kfac train`: a name or table keeps the preset's values for its kind, a config object is complete."""

    def build(**options: Any) -> KFAC:
        return KFAC(dense.net(SIZES), likelihood="gaussian", **options)

    ours = PRESETS["default"]["damping"]["lambda0"]
    assert build(damping="levenberg-marquardt").damping.config.lambda0 == ours
    tied = build(damping={"kind": "levenberg-marquardt", "lambda0": 2.0}).damping.config
    assert (tied.lambda0, tied.gamma_rule) == (2.0, "tied")
    assert build(damping=LevenbergMarquardtConfig()).damping.config.lambda0 == 150.0
    assert build(damping="fixed").damping.config.gamma is None
    assert build(damping="fixed", preset="heskes").damping.config.gamma == 0.1
    assert build(damping="levenberg-marquardt", preset="heskes").damping.config.lambda0 == 150.0
    assert build(approx="tridiag").approx.config.tolerance == PRESETS["default"]["approx"]["tolerance"]
    assert build(approx="tridiag", preset="paper").approx.config.tolerance == 0.0
    assert build(approx="blockdiag").approx.config.kind == "blockdiag"
    mine = build(damping={"lambda0": 2.0}).damping.config  # a table may leave the kind to the preset, as a file may
    assert (mine.kind, mine.lambda0, mine.gamma_rule) == ("levenberg-marquardt", 2.0, "tied")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approx": "tridag"}, "unknown approx 'tridag', did you mean 'tridiag'"),
        ({"likelihood": "bernouli"}, "did you mean 'bernoulli'"),
        ({"estimator": {"kind": "monte-carlo", "tau": 0.5}}, "did you mean 'tau1'"),
        ({"damping": {"lamda0": 1.0}}, r"unknown key 'lamda0' in damping, did you mean 'lambda0'"),
        ({"momentum": 0.9}, "momentum takes a name"),
        ({"preset": "papr"}, "unknown preset 'papr', did you mean 'paper'"),
        ({"weight_decay": -1.0}, "weight_decay must be a number >= 0, found -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number >= 0, found nan"),
        ({"weight_decay": "small"}, "weight_decay must be a number >= 0, found 'small'"),
        ({"seed": 1.5}, "seed must be an integer, found 1.5"),
        ({"estimator": {"kind": "exact", "tau1": 0}}, r"estimator\.tau1"),
        ({"damping": ExactConfig()}, "damping takes a DampingConfig, found a ExactConfig"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KFAC(dense.net(SIZES), **{"likelihood": "gaussian", **options})


def test_a_likelihood_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs likelihood = 'bernoulli', 'categorical' or 'gaussian'"):
        KFAC(dense.net(SIZES))


# --- what a step does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_a_first_step_from_its_definition(approx: str) -> None:
    """Everything dense: exact factors, F-hat, alpha from the exact Fisher, lambda and eta where they belong."""
    eta, lam, gamma, n, tau2 = 0.03, 0.4, 0.2, 30, 0.5
    model = dense.net(SIZES)
    x, y = data(n)
    J, theta = dense.jacobian(model, x), dense.theta(model)
    z = model(x).detach()
    b = torch.einsum("nop,no->p", J, z - y) / n + eta * theta
    o = SIZES[-1]
    eye = torch.eye(o, dtype=Float)[:, None, :].expand(o, n, o)
    factors = dense.Kronecker.of(dense.case_samples(model, x, eye)).damped(gamma)
    inverse = torch.linalg.inv(dense.block_diagonal(factors))
    if approx == "tridiag":
        inverse = dense.tridiagonal_inverse(factors)
    delta = -inverse @ b
    F = dense.fisher(model, "gaussian", x[:15])
    curvature = delta @ F @ delta + (lam + eta) * delta @ delta
    alpha = -(b @ delta) / curvature
    optimizer = KFAC(
        model,
        likelihood="gaussian",
        approx={"kind": approx, "power": 1.0},
        estimator={"kind": "exact", "tau1": 1.0},
        damping={"kind": "fixed", "lambda0": lam, "gamma": gamma},
        momentum={"kind": "quadratic-model", "tau2": tau2, "min_cases": 1, "slope": "batch"},
        trust="none",
        weight_decay=eta,
    )
    report = optimizer.step(x, y)
    assert dense.relative(dense.theta(model) - theta, alpha * delta) < 1e-10
    assert float(report.alpha) == pytest.approx(float(alpha), rel=1e-10)
    assert float(report.mu) == 0.0
    assert float(report.model_value) == pytest.approx(float(0.5 * alpha * (b @ delta)), rel=1e-10)
    loss = float(0.5 * (z - y).square().sum(1).mean())
    assert float(report.loss) == pytest.approx(loss, rel=1e-12)
    assert float(report.objective) == pytest.approx(loss + 0.5 * eta * float(theta @ theta), rel=1e-12)
    assert float(report.error) == pytest.approx(2 * loss, rel=1e-12)
    assert float(report.lam) == lam
    assert float(report.gamma) == gamma


def test_a_second_step_from_its_definition() -> None:
    """With momentum, on the plane of the proposal and the step before; statistics as running averages."""
    eta, lam, gamma = 0.03, 0.4, 0.2
    model = dense.net(SIZES)
    optimizer = KFAC(
        model,
        likelihood="gaussian",
        approx={"kind": "blockdiag", "power": 1.0},
        estimator={"kind": "exact", "tau1": 1.0},
        damping={"kind": "fixed", "lambda0": lam, "gamma": gamma},
        momentum={"kind": "quadratic-model", "tau2": 1.0},
        weight_decay=eta,
    )
    eye = torch.eye(SIZES[-1], dtype=Float)[:, None, :]
    factors = []
    for k in range(2):
        x, y = data(30, seed=k)
        theta = dense.theta(model)
        factors.append(dense.Kronecker.of(dense.case_samples(model, x, eye.expand(-1, 30, -1))))
        if k == 1:
            J = dense.jacobian(model, x)
            b = torch.einsum("nop,no->p", J, model(x).detach() - y) / 30 + eta * theta
            F = dense.fisher(model, "gaussian", x) + (lam + eta) * torch.eye(len(theta), dtype=Float)
        report = optimizer.step(x, y)
        if k == 0:
            previous = dense.theta(model) - theta
    mean = dense.Kronecker(
        [[(a + c) / 2 for a, c in zip(r, s, strict=True)] for r, s in zip(factors[0].A, factors[1].A, strict=True)],
        [[(a + c) / 2 for a, c in zip(r, s, strict=True)] for r, s in zip(factors[0].G, factors[1].G, strict=True)],
    )
    delta = -torch.linalg.solve(dense.block_diagonal(mean.damped(gamma)), b)
    V = torch.stack([delta, previous])
    alpha, mu = -torch.linalg.solve(V @ F @ V.T, V @ b)
    assert float(report.alpha) == pytest.approx(float(alpha), rel=1e-9)
    assert float(report.mu) == pytest.approx(float(mu), rel=1e-9)
    assert dense.relative(dense.theta(model) - theta, alpha * delta + mu * previous) < 1e-9
    assert abs(float(mu)) > 1e-3


def test_rho_is_the_ratio_of_actual_to_predicted_change() -> None:
    model = dense.net(SIZES)
    optimizer = KFAC(
        model,
        likelihood="gaussian",
        damping={"kind": "levenberg-marquardt", "lambda0": 1.0, "lambda_every": 1},
        weight_decay=0.1,
    )
    x, y = data()

    @torch.no_grad()
    def objective() -> float:
        theta = dense.theta(model)
        return float(0.5 * (model(x) - y).square().sum(1).mean() + 0.05 * theta @ theta)

    for k in range(4):
        before = objective()
        report = optimizer.step(x, y)
        assert float(report.objective) == pytest.approx(before, rel=1e-12)
        assert report.rho is not None
        assert float(report.rho) == pytest.approx((objective() - before) / float(report.model_value), rel=1e-8), k


def test_rho_is_minus_infinity_where_the_objective_went_up() -> None:
    """A learning rate a thousand times too large: the step is taken all the same, and lambda rises."""
    model = dense.net(SIZES)
    optimizer = KFAC(
        model,
        likelihood="gaussian",
        momentum={"kind": "fixed", "lr": 1e3},
        damping={"kind": "levenberg-marquardt", "lambda0": 1.0, "lambda_every": 1, "rate": 0.95},
        trust="none",
    )
    before = dense.theta(model)
    report = optimizer.step(*data())
    assert float(report.rho) == -math.inf
    assert float(optimizer.damping.lam) == pytest.approx(20 / 19, rel=1e-14)
    assert not torch.equal(before, dense.theta(model))


def test_the_best_of_three_gammas_is_kept() -> None:
    """The candidate with the smallest model value, with its inverse and its step."""
    model = dense.net(SIZES)
    damping = {"kind": "levenberg-marquardt", "lambda0": 0.5, "gamma_rule": "compared", "gamma_every": 4}
    optimizer = KFAC(model, likelihood="gaussian", damping=damping)
    train(optimizer, 3)
    gammas = [float(g) for g in optimizer.damping.candidates(4)]
    values: list[Tensor] = []
    original = optimizer.momentum.coefficients

    def spy(M: Tensor, b: Tensor) -> Tensor:
        values.append(0.5 * (b * original(M, b)).sum(1))
        return original(M, b)

    optimizer.momentum.coefficients = spy  # type: ignore[method-assign]  # a spy
    (report,) = train(optimizer, 1, start=3)
    best = int(values[0].argmin())
    assert len(values[0]) == 3
    assert float(report.gamma) == gammas[best] == float(optimizer.damping.gamma)
    assert float(report.model_value) == pytest.approx(float(values[0].min()), rel=1e-12)
    assert report.refreshed
    assert optimizer.preconditioner is not None
    assert optimizer._directions.grad is not None
    assert optimizer._directions.delta is not None
    blocks = optimizer.preconditioner.solve(optimizer._directions.grad.blocks)
    step = [float(report.alpha) * -b for b in blocks]
    found = [d.clone() for d in optimizer._directions.delta.blocks]
    assert all(torch.isfinite(s).all() for s in step)
    assert len(found) == len(step)


def test_automatic_lambda_comes_from_the_first_batch() -> None:
    """In the first step's report and model already; later batches, and a restored state, do not set it again."""
    damping = {"kind": "levenberg-marquardt", "lambda0": None, "lambda_every": 1000}
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", estimator="exact", damping=damping, trust="none")
    share = float(optimizer.damping.lam)
    reports = train(optimizer, 4)
    assert optimizer.preconditioner is not None
    (first,) = {float(report.lam) for report in reports}
    x, _ = data(seed=0)
    F = dense.fisher(dense.net(SIZES), "gaussian", x[: optimizer.estimator.cases(len(x))])
    assert first == pytest.approx(share * float(F.diagonal().mean()), rel=1e-10)
    again = KFAC(dense.net(SIZES), likelihood="gaussian", estimator="exact", damping=damping, trust="none")
    again.load_state_dict(optimizer.state_dict())
    assert float(train(again, 1, start=4)[0].lam) == first


def test_refreshes_every_t3() -> None:
    approx = {"kind": "blockdiag", "refresh_every": 6, "refresh_growth": None}
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", approx=approx)
    refreshed = [r.step for r in train(optimizer, 19) if r.refreshed]
    assert refreshed == [1, 2, 3, 6, 12, 18]


def test_reports_of_a_run_without_a_model() -> None:
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", preset="heskes")
    for report in train(optimizer, 6):
        assert report.model_value is None
        assert report.rho is None
        assert float(report.alpha) == 1.0
        assert float(report.mu) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, Float])
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
def test_training_lowers_the_objective(likelihood: str, approx: str, dtype: torch.dtype) -> None:
    model = dense.net(SIZES).to(dtype)
    x, y = data(100, dtype=dtype)
    y = {"gaussian": y, "bernoulli": (y > 0).to(dtype), "categorical": labels(100)}[likelihood]
    optimizer = KFAC(model, likelihood=likelihood, approx=approx)
    reports = [optimizer.step(x, y) for _ in range(25)]
    first, last = float(reports[0].objective), float(reports[-1].objective)
    assert last < 0.8 * first
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert reports[-1].objective.dtype == Float
    assert all(r.notices == () for r in reports)
    assert [r.step for r in reports] == list(range(1, 26))
    assert {r.batch_size for r in reports} == {100}


def test_same_seed_same_result_and_other_seed_another() -> None:
    found = []
    for seed in (0, 0, 1):
        model = dense.net(SIZES)
        torch.manual_seed(len(found))  # the global generator plays no part
        train(KFAC(model, likelihood="gaussian", approx="tridiag", seed=seed), 6)
        found.append(dense.theta(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_global_generator_is_left_alone() -> None:
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian")
    before = torch.get_rng_state()
    train(optimizer, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_of_one_and_a_case_of_statistics() -> None:
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", approx="tridiag")
    for k in range(6):
        report = optimizer.step(*data(1, seed=k))
        assert bool(torch.isfinite(report.objective))
        assert report.batch_size == 1


def test_weight_decay_reaches_biases_and_can_be_changed() -> None:
    """A param_groups entry, as in any torch optimizer."""
    model = dense.net(SIZES)
    optimizer = KFAC(model, likelihood="gaussian", weight_decay=0.0)
    x, y = data()
    report = optimizer.step(x, y)
    assert float(report.objective) == float(report.loss)
    optimizer.param_groups[0]["weight_decay"] = 2.0
    theta = dense.theta(model)
    report = optimizer.step(x, y)
    assert float(report.objective - report.loss) == pytest.approx(float(theta @ theta), rel=1e-12)


def test_frozen_layers_do_not_move() -> None:
    model = dense.net((4, 5, 4, 3))
    model[2].requires_grad_(False)
    kept = model[2].weight.clone()
    train(KFAC(model, likelihood="gaussian"), 4)
    assert torch.equal(model[2].weight, kept)


def test_a_learning_rate_scheduler_does_not_break_it() -> None:
    """zero_grad and hooks of torch's base class work."""
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian")
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.zero_grad()
    train(optimizer, 2)
    assert calls == ["after", "after"]


@pytest.mark.parametrize(("shape", "rows"), [((4,), 1.0), ((7, 4), 7.0)])
def test_the_share_of_refreshes_knows_that_a_step_works_on_every_position(shape: tuple[int, ...], rows: float) -> None:
    """A net on positions costs as many times more: counted by cases its inverse was hardly ever made anew."""
    optimizer = KFAC(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), likelihood="gaussian")
    for seed in range(3):
        x = dense.randn(6, *shape, seed=seed).float()
        optimizer.step(x, x[..., :3])
    assert optimizer.preconditioner is not None
    assert optimizer.preconditioner.rows == rows
