"""Levenberg-Marquardt's rule for lambda, the candidates of gamma, and constant damping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kfac_plugins.damping import FixedDampingConfig, LevenbergMarquardtConfig
from kfac_plugins.damping.fixed import FixedDamping
from kfac_plugins.damping.levenberg_marquardt import LevenbergMarquardt
from kfacore import host
from kfacore.errors import ConfigError
from kfacore.registry import get_registry

ETA = 1e-5
CPU = torch.device("cpu")
Float = torch.float64


def started(eta: float = ETA, **options: Any) -> LevenbergMarquardt:
    damping = LevenbergMarquardt(LevenbergMarquardtConfig(**options))
    damping.start(eta, CPU)
    return damping


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=Float)


def test_start() -> None:
    damping = started(lambda0=3.0)
    assert float(damping.lam) == 3.0
    assert float(damping.gamma) == math.sqrt(3.0 + ETA)
    assert damping.lam.dtype == damping.gamma.dtype == Float
    assert float(started().lam) == 150.0


@pytest.mark.parametrize("every", [1, 5, 7])
@pytest.mark.parametrize(
    ("rho", "power"),
    [
        (1.9, 1),
        (0.7500001, 1),
        (0.75, 0),
        (0.5, 0),
        (0.25, 0),
        (0.2499999, -1),
        (0.0, -1),
        (-3.0, -1),
        (-math.inf, -1),
        (math.nan, -1),
        (math.inf, 1),
    ],
)
def test_lambda_follows_rho(rho: float, power: int, every: int) -> None:
    """Below 1/4 or not a number up, above 3/4 down, between the same; exact in double precision."""
    damping = started(lambda0=150.0, lambda_every=every)
    damping.adapt(scalar(rho))
    assert float(damping.lam) == pytest.approx(150.0 * ((19 / 20) ** every) ** power, rel=1e-15)
    assert damping.lam.dtype == Float
    assert float(damping.gamma) == math.sqrt(150.0 + ETA)


def test_automatic_lambda_follows_the_curvature() -> None:
    """A constant share of the mean diagonal of the Fisher; a given lambda is left alone."""
    damping = started(lambda0=None, gamma_rule="tied")
    share = float(damping.lam)
    damping.observe(scalar(0.02))
    assert float(damping.lam) == pytest.approx(0.02 * share, rel=1e-15)
    assert float(damping.gamma) == pytest.approx(math.sqrt(0.02 * share + ETA), rel=1e-15)
    assert float(damping.candidates(1)[0]) == pytest.approx(float(damping.gamma), rel=1e-15)
    assert damping.lam.dtype == damping.gamma.dtype == Float
    for nothing in (0.0, math.nan):
        damping = started(lambda0=None)
        damping.observe(scalar(nothing))
        assert float(damping.lam) == share
    given = started(lambda0=2.0)
    given.observe(scalar(0.02))
    assert float(given.lam) == 2.0


def test_lambda_moves_at_the_chosen_rate() -> None:
    damping = started(lambda0=1.0, rate=0.8, lambda_every=3)
    damping.adapt(scalar(1.0))
    assert float(damping.lam) == pytest.approx(0.8**3, rel=1e-15)


def test_tied_gamma_follows_lambda() -> None:
    """gamma = sqrt(lambda + eta) of this moment, never several, and clamped by nothing."""
    damping = started(lambda0=4.0, gamma_rule="tied", lambda_every=1)
    for k in range(1, 41):
        (gamma,) = damping.candidates(k)
        assert float(gamma) == pytest.approx(math.sqrt(float(damping.lam) + ETA), rel=1e-15)
        damping.adapt(scalar(1.9))
    assert float(damping.gamma) == math.sqrt(4.0 + ETA)  # of the last refresh, until one is taken up
    damping.choose(damping.candidates(41)[0])
    assert float(damping.gamma) == pytest.approx(math.sqrt(4.0 * 0.95**40 + ETA), rel=1e-14)


def test_lambda_adapts_every_t1_steps() -> None:
    damping = started(lambda_every=5)
    assert [k for k in range(1, 21) if damping.adapts(k)] == [5, 10, 15, 20]


def test_candidates_every_t2_steps() -> None:
    damping = started(lambda0=0.04)
    for k in range(1, 61):
        assert len(damping.candidates(k)) == (3 if k % 20 == 0 else 1)
    gamma, w2 = math.sqrt(0.04 + ETA), math.sqrt(19 / 20) ** 20
    found = [float(g) for g in damping.candidates(20)]
    assert found == pytest.approx([gamma * w2, gamma, gamma / w2], rel=1e-15)
    assert float(damping.candidates(19)[0]) == gamma


@pytest.mark.parametrize(
    ("gamma", "options", "wanted"),
    [
        # above the upper clamp: 1 is the "upper" candidate, so that gamma can come down
        (1.7, {}, (1.7 * math.sqrt(0.95) ** 20, 1.7, 1.0)),
        (0.9, {}, (0.9 * math.sqrt(0.95) ** 20, 0.9, 1.0)),
        # below the lower clamp sqrt(eta)
        (0.003, {}, (math.sqrt(ETA), 0.003, 0.003 / math.sqrt(0.95) ** 20)),
        (0.003, {"gamma_min": 0.0}, (0.003 * math.sqrt(0.95) ** 20, 0.003, 0.003 / math.sqrt(0.95) ** 20)),
        (0.2, {"gamma_min": 0.15, "gamma_max": 0.3}, (0.15, 0.2, 0.3)),
        # the paper: no clamp
        (1.7, {"gamma_max": None}, (1.7 * math.sqrt(0.95) ** 20, 1.7, 1.7 / math.sqrt(0.95) ** 20)),
    ],
)
def test_only_new_candidates_are_clamped(
    gamma: float, options: dict[str, Any], wanted: tuple[float, float, float]
) -> None:
    damping = started(**options)
    damping.choose(scalar(gamma))
    assert [float(g) for g in damping.candidates(20)] == pytest.approx(list(wanted), rel=1e-14)


def test_choice_and_state_round_trip() -> None:
    damping = started(lambda0=2.0)
    damping.choose(damping.candidates(20)[0])
    damping.adapt(scalar(0.1))
    other = started(lambda0=150.0)
    other.load_state_dict(damping.state_dict())
    assert torch.equal(other.lam, damping.lam)
    assert torch.equal(other.gamma, damping.gamma)
    assert [float(a) for a in other.candidates(20)] == [float(a) for a in damping.candidates(20)]


def test_saved_state_is_not_changed_by_later_steps() -> None:
    damping = started(lambda0=2.0)
    state = damping.state_dict()
    damping.adapt(scalar(2.0))
    damping.choose(damping.candidates(20)[2])
    assert float(state["lam"]) == 2.0
    assert float(state["gamma"]) == math.sqrt(2.0 + ETA)


@pytest.mark.parametrize(
    ("options", "lam", "gamma"),
    [
        ({}, 0.0, math.sqrt(ETA)),
        ({"lambda0": 4.0}, 4.0, math.sqrt(4.0 + ETA)),
        ({"lambda0": 4.0, "gamma": 0.1}, 4.0, 0.1),
    ],
)
def test_fixed_damping_never_moves(options: dict[str, float], lam: float, gamma: float) -> None:
    damping = FixedDamping(FixedDampingConfig(**options))
    damping.start(ETA, CPU)
    assert float(damping.lam) == lam
    assert float(damping.gamma) == gamma
    for k in range(1, 41):
        assert len(damping.candidates(k)) == 1
        assert not damping.adapts(k)
    damping.adapt(scalar(-math.inf))
    assert float(damping.lam) == lam
    assert not FixedDamping.uses_model


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"kind": "levenberg-marquardt", "lambda0": 0.0}, "lambda0"),
        ({"kind": "levenberg-marquardt", "lambda_every": 0}, "lambda_every"),
        ({"kind": "levenberg-marquardt", "gamma_min": -1.0}, "gamma_min"),
        ({"kind": "levenberg-marquardt", "lambda0": math.nan}, "lambda0"),
        ({"kind": "fixed", "gamma": 0.0}, "gamma"),
    ],
)
def test_bad_options(table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"damping\.{key}"):
        get_registry().build("damping", table)


def test_no_damping_at_all_can_be_asked_for() -> None:
    """The theorems are about undamped factors."""
    damping = FixedDamping(FixedDampingConfig())
    damping.start(0.0, CPU)
    assert float(damping.gamma) == float(damping.lam) == 0.0


def told(slope: float, times: int, **options: Any) -> float:
    """lambda after so many new mini-batches with this slope left and a curvature of 2, each with a rho of 1."""
    damping = started(lambda0=1.0, confirmed=True, **options)
    for _ in range(times):
        damping.confirm(scalar(slope), scalar(2.0))
        damping.adapt(scalar(1.0))
    return float(damping.lam)


def test_lambda_falls_only_while_new_mini_batches_see_no_overshoot() -> None:
    assert told(0.0, 40) < 1e-3  # steps end at the minimum
    assert told(-1.0, 40) == pytest.approx(told(0.0, 40))  # before it
    assert told(2.0, 40) > 10.0  # twice as far
    assert told(0.9, 50) < told(0.9, 40) < 0.1  # nearly so: nothing keeps lambda where it is


def test_a_slope_that_may_be_noise_raises_nothing() -> None:
    damping = started(lambda0=1.0, confirmed=True)
    for k in range(60):
        damping.confirm(scalar(4.0 if k % 2 else -2.0), scalar(1.1))  # 1 on average, but hardly sure
        damping.adapt(scalar(0.5))
    assert float(damping.lam) == 1.0


def settled(curvature: float, share: float) -> float:
    """lambda after steps of length 1 to the minimum of the model, whose curvature is given.

    A step has the slope -(curvature + lambda) on its own mini-batch where it begins; the next one sees a share of it.
    """
    damping = started(lambda0=1.0, confirmed=True)
    for _ in range(400):
        bound = curvature + float(damping.lam)
        damping.confirm(scalar((curvature - share * bound) / (0.5 * bound)), scalar(curvature / (0.5 * bound)))
        damping.adapt(scalar(1.0))
    return float(damping.lam)


@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e4])
def test_mini_batches_that_disagree_however_short_the_step_is_do_not_raise_lambda_for_ever(curvature: float) -> None:
    """As those of a small data set near its optimum. lambda settles where it does as much as the curvature."""
    assert settled(curvature, -0.5) == pytest.approx(curvature, rel=0.7)
    assert settled(curvature, 1.0) < 1e-6 * curvature  # where they agree it falls as before


def test_a_step_that_the_next_mini_batch_has_undone_raises_lambda_only_while_the_curvature_decides() -> None:
    yes = torch.ones((), dtype=torch.bool)
    for curvature, factor in ((2.0, 2.0), (0.1, 1.0)):
        damping = started(lambda0=1.0, confirmed=True)
        for _ in range(40):
            damping.confirm(scalar(0.0), scalar(curvature))
        damping.caution(2.0, yes)
        assert float(damping.lam) == factor
        damping.caution(2.0, ~yes)
        assert float(damping.lam) == factor
        damping.strengthen(10.0, yes)  # its own mini-batch is always heard
        assert float(damping.lam) == 10.0 * factor
    unasked = started(lambda0=1.0)
    unasked.caution(2.0, yes)
    assert float(unasked.lam) == 2.0


def test_what_is_not_a_number_is_no_witness_and_host_and_device_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for free in (True, False):
        monkeypatch.setattr(host, "is_free", lambda value, free=free: free)
        damping = started(lambda0=1.0, confirmed=True)
        for slope, curvature in ((0.3, 1.0), (math.nan, 1.0), (1e9, 2.0), (0.1, math.inf), (-0.5, math.nan)):
            damping.confirm(scalar(slope), scalar(curvature))
        seen.append(damping.state_dict()["seen"])
    assert torch.equal(*seen)
    assert bool(seen[0].isfinite().all())
