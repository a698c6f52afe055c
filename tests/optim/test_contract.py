"""`KFAC` as an optimizer of torch: schedulers, a model that is moved, gradients to look at, and sentences elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

from kfacore import KFAC, ConfigError, UnsupportedModelError

CONSTANT = {"kind": "levenberg-marquardt", "lambda0": 0.5, "lambda_every": 1000}

SCHEDULERS: dict[str, Callable[[KFAC], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.1, anneal_epochs=2),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(k: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return x.to(dtype), x[:, :3].argmax(1)


def make(model: nn.Module | None = None, **options: Any) -> KFAC:
    return KFAC(net() if model is None else model, **{"likelihood": "categorical", **options})


# --- a factor on the step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_scales_the_steps(name: str) -> None:
    """The rates are those that it sets for SGD, and each step moves by its rate times the whole step."""
    optimizer = make(damping=CONSTANT, momentum={"kind": "quadratic-model", "tau2": 1.0})
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    mine, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](other)  # type: ignore[arg-type]  # SGD
    for k in range(6):
        rate = optimizer.param_groups[0]["lr"]
        assert rate == other.param_groups[0]["lr"]
        whole = copy.deepcopy(optimizer)
        whole.param_groups[0]["lr"] = 1.0
        before = dense.theta(optimizer.model)
        optimizer.step(*data(k))
        whole.step(*data(k))
        moved = dense.theta(optimizer.model) - before
        torch.testing.assert_close(moved, rate * (dense.theta(whole.model) - before), rtol=1e-10, atol=1e-14)
        other.step()
        for scheduler in (mine, theirs):
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_model_is_asked_at_the_scaled_step(iterations: int) -> None:
    """With M and b of the whole mini-batch the predicted change is the quadratic model's there, so rho is fair."""
    options: dict[str, Any] = {"momentum": {"kind": "quadratic-model", "tau2": 1.0, "iterations": iterations}}
    whole, half = make(damping=CONSTANT, **options), make(damping=CONSTANT, **options, lr=0.5)
    value, scaled = (float(opt.step(*data()).model_value) for opt in (whole, half))  # type: ignore[arg-type]
    # At the minimum of the model along the step, the linear term is twice its value and the square one minus it.
    assert scaled == pytest.approx((2 * 0.5 - 0.5**2) * value, rel=1e-9)


def test_a_rate_of_one_is_the_step_bit_for_bit_and_of_zero_none() -> None:
    plain, one, none = make(), make(lr=1.0), make(lr=0.0)
    start, lam = dense.theta(none.model), float(none.damping.lam)
    for k in range(6):
        assert float(plain.step(*data(k)).objective) == float(one.step(*data(k)).objective)
        none.step(*data(0))
    assert torch.equal(dense.theta(plain.model), dense.theta(one.model))
    assert torch.equal(dense.theta(none.model), start)
    assert lam > 0
    assert float(none.damping.lam) < 1e3, "steps of length zero say nothing against the model"


def test_what_is_seen_along_a_scaled_step_is_that_of_the_whole_one() -> None:
    """To rounding, on a linear model with a quadratic loss: lambda does not take a short step for a timid one."""
    seen = []
    for lr in (1.0, 0.5, 0.25):
        torch.manual_seed(1)
        optimizer = make(nn.Linear(5, 3).double(), likelihood="gaussian", damping=CONSTANT, estimator="exact", lr=lr)
        optimizer.damping.confirm = lambda *each: seen.append(torch.stack(each))  # type: ignore[method-assign]  # a spy
        for _ in range(2):
            x, _ = data()
            optimizer.step(x, x[:, :3])
    for found in seen[3::2]:
        torch.testing.assert_close(found, seen[1], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), "0.1", True])
def test_rates_that_are_none(lr: Any) -> None:
    with pytest.raises(ConfigError, match="lr must be a number >= 0, found"):
        make(lr=lr)


def test_a_rate_is_kept_by_states_and_copies() -> None:
    optimizer = make(lr=0.5)
    optimizer.step(*data())
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.5
    other = make()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


# --- calls as of other optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [net().parameters(), list(net().parameters()), [{"params": list(net().parameters())}], net()[0].weight]
)
def test_parameters_in_place_of_the_model(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"takes the model itself.*write KFAC\(model, likelihood=...\)"):
        KFAC(given, likelihood="categorical")


def test_calls_that_cannot_be_served_say_what_to_write() -> None:
    optimizer, (x, y) = make(), data()
    with pytest.raises(ConfigError, match=r"needs the mini-batch: write optimizer.step\(inputs, targets\)"):
        optimizer.step()
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ConfigError, match="cannot use a closure, which hides the model's outputs"):
            call()
    for inputs in (x, [x, x], []):
        with pytest.raises(ConfigError, match="needs targets beside the inputs"):
            optimizer.step(inputs)
    assert optimizer.steps == 0
    optimizer.step(x, y)


def test_a_scaler_is_told_that_it_is_not_needed() -> None:
    optimizer, (x, y) = make(net(torch.float32)), data(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(nn.functional.cross_entropy(optimizer.model(x), y)).backward()
    with pytest.raises(ConfigError, match=r"needs no GradScaler.*build the scaler with enabled=False"):
        scaler.step(optimizer, x, y)
    optimizer.step(x, y)
    report = torch.amp.GradScaler("cpu", enabled=False).step(optimizer, x, y)
    assert report is not None
    assert report.step == 2  # type: ignore[attr-defined]  # our report


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "bce_with_logits"])
def test_losses_by_their_usual_names(name: str) -> None:
    x, y = data()
    targets = {"mse": x[:, :3], "cross_entropy": y, "bce_with_logits": (x[:, :3] > 0).double()}[name]
    loss = {"mse": "mse_loss", "bce_with_logits": "binary_cross_entropy_with_logits"}.get(name, name)
    optimizer = make(likelihood=name)
    wanted = getattr(nn.functional, loss)(optimizer.model(x), targets).detach()
    assert float(optimizer.step(x, targets).loss) == pytest.approx(float(wanted), rel=1e-12)


def test_a_likelihood_that_is_nearly_right() -> None:
    with pytest.raises(ConfigError, match="did you mean 'categorical'"):
        make(likelihood="categoricl")


# --- gradients, averages, hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_left_where_torch_has_them(kind: str) -> None:
    torch.manual_seed(1)
    x, y = data()
    model: nn.Module = net()
    if kind == "conv":
        model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.LayerNorm(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
        x = x.unsqueeze(1)
    optimizer = make(model, fill_grad=True, weight_decay=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    optimizer.step(x, y)
    for p, grad in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-14)
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)) > 0
    twin = copy.deepcopy(optimizer)
    twin.step(x, y)
    assert all(p.grad is not None for p in twin.model.parameters())


def test_without_asking_no_gradient_is_left() -> None:
    optimizer = make()
    optimizer.step(*data())
    assert all(p.grad is None for p in optimizer.model.parameters())


def test_averages_and_hooks() -> None:
    optimizer, seen = make(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    average = AveragedModel(optimizer.model)
    for k in range(3):
        optimizer.step(*data(k))
        average.update_parameters(optimizer.model)
    assert seen == ["before", "after"] * 3


# --- a model that is moved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_a_model_that_becomes_double_in_mid_training(approx: str) -> None:
    """It goes on as a double model with the state of the single one would."""
    optimizer = make(net(torch.float32), approx=approx)
    for k in range(5):
        optimizer.step(*data(k, torch.float32))
    other = make(net(), approx=approx)
    other.model.load_state_dict(optimizer.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    optimizer.model.double()
    for k in range(5, 9):
        assert float(optimizer.step(*data(k)).objective) == float(other.step(*data(k)).objective)
    assert optimizer.damping.lam.dtype == torch.float64
    delta = optimizer._directions.delta
    assert delta is not None
    assert delta.flat.dtype == torch.float64


def test_a_model_that_becomes_half_is_refused() -> None:
    optimizer = make(net(torch.float32))
    optimizer.step(*data(dtype=torch.float32))
    optimizer.model.bfloat16()
    with pytest.raises(UnsupportedModelError, match="0: its parameters are bfloat16, in which factors cannot"):
        optimizer.step(*data(dtype=torch.bfloat16))


def test_a_model_that_is_moved_to_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    optimizer = make(estimator="exact")
    other = make(estimator="exact")
    for k in range(5):
        optimizer.step(*data(k))
        other.step(*data(k))
    optimizer.model.to("cuda")
    for k in range(5, 9):
        moved = optimizer.step(*(each.cuda() for each in data(k)))
        assert float(moved.objective) == pytest.approx(float(other.step(*data(k)).objective), rel=1e-8)
    optimizer.model.cpu()
    assert float(optimizer.step(*data(9)).objective) == pytest.approx(float(other.step(*data(9)).objective), rel=1e-8)
