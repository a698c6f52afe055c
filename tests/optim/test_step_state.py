"""Saving and going on: bit for bit what an uninterrupted run does, through files that load with weights only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC
from kfacore.errors import ConfigError, UnsupportedModelError
from kfacore.optim.guest_state import own_state

SIZES = (4, 6, 5, 3)
APPROXIMATIONS: list[Any] = ["blockdiag", "tridiag", {"kind": "tridiag", "tolerance": 0.01}]


def data(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dense.randn(40, SIZES[0], seed=seed).to(dtype), dense.randn(40, SIZES[-1], seed=seed + 200).to(dtype)


def make(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> KFAC:
    return KFAC(dense.net(SIZES, seed=seed).to(dtype), **{"likelihood": "gaussian", "approx": "tridiag", **options})


def run(optimizer: KFAC, start: int, stop: int) -> list[tuple[float, ...]]:
    dtype = next(optimizer.model.parameters()).dtype
    history = []
    for k in range(start, stop):
        r = optimizer.step(*data(k, dtype))
        values = (r.objective, r.model_value, r.rho, r.lam, r.gamma, r.alpha, r.mu)
        history.append((float(r.step), *(float("nan") if v is None else float(v) for v in values)))
    return history


def same(a: Any, b: Any, where: str = "state") -> None:
    """The same nest, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("approx", APPROXIMATIONS, ids=str)
@pytest.mark.parametrize("pause", [3, 7, 10])
def test_ten_and_ten_are_twenty(approx: Any, dtype: torch.dtype, pause: int, tmp_path: Path) -> None:
    """Paused after a refresh, an adaptation, a comparison of gammas (every 5 here), or none of them."""
    options: dict[str, Any] = {
        "approx": {"refresh_every": 7, **({"kind": approx} if isinstance(approx, str) else approx)},
        "damping": {"kind": "levenberg-marquardt", "lambda0": 0.3, "lambda_every": 5, "gamma_every": 10},
    }
    whole = make(dtype, **options)
    wanted = run(whole, 0, 20)
    first = make(dtype, **options)
    history = run(first, 0, pause)
    torch.save({"model": first.model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    run(first, pause, pause + 2)  # what happens later must not reach the file's contents

    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = KFAC(dense.net(SIZES, seed=9).to(dtype), likelihood="gaussian", seed=77, **options)
    second.model.load_state_dict(loaded["model"])
    second.load_state_dict(loaded["optimizer"])
    history += run(second, pause, 20)
    assert str(history) == str(wanted)  # NaN where a value is absent
    same(second.model.state_dict(), whole.model.state_dict())
    same(own_state(second.state_dict()), own_state(whole.state_dict()))


def test_a_state_before_the_first_step() -> None:
    first, second = make(), make(seed=3)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert str(run(first, 0, 4)) == str(run(second, 0, 4))


@pytest.mark.parametrize("momentum", ["quadratic-model", {"kind": "fixed", "lr": 0.1, "mu": 0.9}])
def test_a_state_before_the_first_step_takes_everything_back(momentum: Any) -> None:
    optimizer = make(momentum=momentum)
    model, state = clone(optimizer.model.state_dict()), optimizer.state_dict()
    wanted = run(optimizer, 0, 4)
    optimizer.model.load_state_dict(model)
    optimizer.load_state_dict(state)
    assert optimizer.preconditioner is None
    assert str(run(optimizer, 0, 4)) == str(wanted)


@pytest.mark.parametrize("rule", ["tied", "compared"])
def test_gamma_follows_the_weight_decay_of_a_loaded_state(rule: str) -> None:
    damping = {"kind": "levenberg-marquardt", "lambda0": 0.01, "gamma_rule": rule, "gamma_every": 2}
    whole = make(damping=damping, weight_decay=1e-5)
    run(whole, 0, 3)
    model, state = clone(whole.model.state_dict()), whole.state_dict()
    wanted = run(whole, 3, 9)
    other = make(damping=damping, weight_decay=1.0)
    other.model.load_state_dict(model)
    other.load_state_dict(state)
    assert str(run(other, 3, 9)) == str(wanted)


def test_a_state_of_another_kind_of_device_seeds_the_generator_anew() -> None:
    first = make()
    run(first, 0, 4)
    state = first.state_dict()
    own = own_state(state)
    own["generator_device"] = "cuda"
    own["generator"] = torch.zeros(16, dtype=torch.uint8)  # what a CUDA generator's state looks like
    state["kfac"] = own  # where states of 0.2 had it
    histories = []
    for seed in (1, 2):
        second = make(seed=seed)
        second.model.load_state_dict(first.model.state_dict())
        second.load_state_dict(state)
        histories.append(str(run(second, 4, 7)))
    assert histories[0] == histories[1], "it depends on the saved seed and step alone"


def test_loading_again_and_again() -> None:
    """The state is a copy: later steps do not reach it."""
    optimizer = make()
    run(optimizer, 0, 4)
    model, state = clone(optimizer.model.state_dict()), optimizer.state_dict()
    wanted = run(optimizer, 4, 9)
    for _ in range(2):
        optimizer.model.load_state_dict(model)
        optimizer.load_state_dict(state)
        assert str(run(optimizer, 4, 9)) == str(wanted)


def clone(nest: Any) -> Any:
    if isinstance(nest, Tensor):
        return nest.clone()
    if isinstance(nest, dict):
        return {key: clone(value) for key, value in nest.items()}
    return [clone(value) for value in nest] if isinstance(nest, list) else nest


def test_a_loaded_optimizer_shares_nothing_with_the_one_that_was_saved() -> None:
    """Two optimizers from one state in memory go their own ways."""
    first = make()
    run(first, 0, 3)
    state, model = first.state_dict(), clone(first.model.state_dict())
    second = make()
    second.model.load_state_dict(model)
    second.load_state_dict(state)
    third = make()
    third.model.load_state_dict(model)
    third.load_state_dict(clone(state))
    run(first, 3, 9)
    assert str(run(second, 3, 9)) == str(run(third, 3, 9))


@pytest.mark.parametrize("estimator", ["monte-carlo", "empirical", "exact"])
@pytest.mark.parametrize("momentum", ["quadratic-model", "none", {"kind": "fixed", "lr": 0.1, "mu": 0.9}])
@pytest.mark.parametrize("damping", ["levenberg-marquardt", {"kind": "fixed", "lambda0": 0.1}])
def test_every_combination_of_parts_goes_on(estimator: Any, momentum: Any, damping: Any) -> None:
    options = {"estimator": estimator, "momentum": momentum, "damping": damping}
    first, second = make(**options), make(seed=5, **options)
    run(first, 0, 6)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(clone(first.state_dict()))
    assert str(run(first, 6, 11)) == str(run(second, 6, 11))


def test_weight_decay_and_curvature_keep_their_dtype() -> None:
    """Torch's own load_state_dict casts what lies in ``state``; curvature and lambda must not be cast."""
    first, second = make(torch.float32), make(torch.float32)
    first.param_groups[0]["weight_decay"] = 0.125
    run(first, 0, 5)
    second.load_state_dict(first.state_dict())
    assert second.weight_decay == 0.125
    assert second.damping.lam.dtype == second.damping.gamma.dtype == torch.float64
    assert float(second.damping.lam) == float(first.damping.lam)


def test_states_that_do_not_belong_here() -> None:
    optimizer = make()
    run(optimizer, 0, 1)
    state = optimizer.state_dict()
    with pytest.raises(ConfigError, match=r"approx = 'tridiag', this optimizer has 'blockdiag'"):
        make(approx="blockdiag").load_state_dict(state)
    with pytest.raises(ConfigError, match="not of a KFAC optimizer"):
        make().load_state_dict(torch.optim.SGD(dense.net(SIZES).parameters(), lr=0.1).state_dict())
    other = KFAC(nn.Sequential(nn.Identity(), *dense.net(SIZES)), likelihood="gaussian", approx="tridiag")
    with pytest.raises(UnsupportedModelError, match="saved optimizer state has layers 0, 2, 4; this model has 1, 3, 5"):
        other.load_state_dict(state)
    wider = KFAC(dense.net((4, 7, 5, 3)), likelihood="gaussian", approx="tridiag")
    with pytest.raises(UnsupportedModelError, match=r"^0: its weight block has shape \(7, 5\), .* \(6, 5\)"):
        wider.load_state_dict(state)


def test_a_refused_state_changes_nothing() -> None:
    optimizer, twin = make(), make()
    run(optimizer, 0, 3)
    run(twin, 0, 3)
    foreign = make(approx="blockdiag")
    run(foreign, 0, 1)
    with pytest.raises(ConfigError):
        optimizer.load_state_dict(foreign.state_dict())
    assert str(run(optimizer, 3, 6)) == str(run(twin, 3, 6))
