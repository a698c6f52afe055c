"""The coefficients (alpha, mu) of every momentum rule."""

from __future__ import annotations

import dense
import pytest
import torch

from kfac_plugins.momentum import FixedMomentumConfig, NoMomentumConfig, QuadraticModelConfig
from kfac_plugins.momentum.fixed import FixedMomentum
from kfac_plugins.momentum.none import NoMomentum
from kfac_plugins.momentum.quadratic_model import QuadraticModelMomentum
from kfacore.errors import ConfigError
from kfacore.registry import get_registry

Float = torch.float64


def planes(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    roots = dense.randn(count, 2, 3)
    return roots @ roots.mT, dense.randn(count, 2, seed=3)


def test_quadratic_model_is_minus_the_inverse_times_b() -> None:
    M, b = planes()
    found = QuadraticModelMomentum().coefficients(M, b)
    for i in range(len(M)):
        assert dense.relative(found[i], -torch.linalg.solve(M[i], b[i])) < 1e-10


def test_mu_is_not_clipped() -> None:
    """Above 1 and below 0 are right (method, section 4)."""
    M = torch.eye(2, dtype=Float).expand(2, 2, 2)
    b = torch.tensor([[-1.0, -2.0], [-1.0, 0.5]], dtype=Float)
    assert QuadraticModelMomentum().coefficients(M, b)[:, 1].tolist() == [2.0, -0.5]


def test_mu_keeps_to_its_bounds_and_alpha_follows() -> None:
    M = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=Float)
    b = torch.tensor([[-1.0, 3.0]], dtype=Float)
    assert float(QuadraticModelMomentum(QuadraticModelConfig()).coefficients(M, b)[0, 1]) < 0.0
    bounded = QuadraticModelMomentum(QuadraticModelConfig(mu_min=0.0, mu_max=1.0))
    assert bounded.coefficients(M, b).tolist() == [[0.5, 0.0]]
    assert bounded.coefficients(M, -b * 9)[0].tolist() == [-5.0, 1.0]


def test_first_step_has_no_previous_direction() -> None:
    M, b = torch.zeros(1, 2, 2, dtype=Float), torch.zeros(1, 2, dtype=Float)
    M[0, 0, 0], b[0, 0] = 4.0, -2.0
    for rule in (QuadraticModelMomentum(), NoMomentum()):
        assert rule.coefficients(M, b).tolist() == [[0.5, 0.0]]


def test_none_minimises_along_the_proposal_alone() -> None:
    M, b = planes()
    found = NoMomentum().coefficients(M, b)
    assert dense.relative(found[:, 0], -b[:, 0] / M[:, 0, 0]) < 1e-14
    assert not bool(found[:, 1].any())
    assert not NoMomentum.uses_previous
    assert NoMomentum.uses_model


def test_fixed_does_not_look_at_the_model() -> None:
    rule = FixedMomentum(FixedMomentumConfig(lr=0.3, mu=0.9))
    M, b = planes()
    assert rule.coefficients(M, b).tolist() == [[0.3, 0.9]] * len(M)
    assert not FixedMomentum.uses_model


@pytest.mark.parametrize(
    ("tau2", "batch", "cases"),
    [(1.0, 1000, 1000), (0.25, 1000, 250), (0.25, 1001, 251), (0.1, 10, 1), (0.3, 10, 3), (0.01, 5, 1), (1.0, 1, 1)],
)
def test_cases_of_the_quadratic_model(tau2: float, batch: int, cases: int) -> None:
    """ceil(tau_2 m), whatever 0.3 * 10 is in binary."""
    assert QuadraticModelMomentum(QuadraticModelConfig(tau2=tau2)).cases(batch) == cases


@pytest.mark.parametrize(("least", "batch", "cases"), [(60, 1000, 250), (300, 1000, 300), (300, 100, 100), (1, 2, 1)])
def test_the_quadratic_model_has_its_least_cases(least: int, batch: int, cases: int) -> None:
    assert QuadraticModelMomentum(QuadraticModelConfig(tau2=0.25, min_cases=least)).cases(batch) == cases


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "fixed", "lr": 0.0},
        {"kind": "fixed", "mu": 1.0},
        {"kind": "none", "tau2": 0.0},
        {"kind": "none", "tau2": 1.5},
        {"kind": "none", "min_cases": 0},
        {"kind": "quadratic-model", "lr": 1.0},
    ],
)
def test_bad_options(table: dict[str, object]) -> None:
    wrong = next(key for key in table if key != "kind")
    with pytest.raises(ConfigError, match=rf"momentum\.{wrong}|'{wrong}' in momentum"):
        get_registry().build("momentum", table)


def test_a_part_refuses_another_parts_config() -> None:
    with pytest.raises(ConfigError, match="FixedMomentum takes a FixedMomentumConfig, found a NoMomentumConfig"):
        FixedMomentum(NoMomentumConfig())
