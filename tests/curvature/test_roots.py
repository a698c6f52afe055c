"""Square roots in matrix products alone, against eigenvectors in double precision."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from test_kronecker import LAYERS, Float, factors
from torch import Tensor

from kfacore import host
from kfacore.curvature import roots
from kfacore.curvature.kronecker import damp
from kfacore.curvature.roots import inverse_roots, plan, ratios
from kfacore.curvature.tempering import ByInverse, Tempered, temper
from kfacore.errors import NumericalError


@pytest.fixture
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands for a device that is fast at products."""
    monkeypatch.setattr(host, "products_are_fast", lambda device: True)


def spd(d: int, condition: float, seed: int = 0) -> Tensor:
    """Eigenvalues from 1 down to far below 1 / condition, which is the damping."""
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=Float, generator=torch.Generator().manual_seed(seed)))
    return (Q * torch.logspace(0, -2 - 2 * math.log10(condition), d, dtype=Float)) @ Q.T


def damped(d: int, condition: float, count: int = 1) -> tuple[Tensor, Tensor]:
    shift = torch.tensor(1.0 / condition, dtype=Float)
    return torch.stack([spd(d, condition, i) + shift * torch.eye(d, dtype=Float) for i in range(count)]), shift


def power_of(M: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.unsqueeze(-2) ** p) @ vectors.mT


@pytest.mark.parametrize("eps", [2.3e-16, 1.2e-7])
@pytest.mark.parametrize("low", [1e-4, 3e-3, 0.02, 0.1, 0.5, 0.99, 1.0])
def test_a_plan_takes_every_singular_value_to_one(low: float, eps: float) -> None:
    steps = plan(low, eps)
    s = torch.cat([torch.linspace(low, 1.0, 3000, dtype=Float), torch.logspace(math.log10(low), 0, 3000, dtype=Float)])
    for a, b, c in steps:
        s = s * (a + b * s**2 + c * s**4)
    assert float((s - 1).abs().max()) <= max(eps, 1e-15)
    assert len(steps) <= 4 + math.log(1 / low) / math.log(4), "each of the first steps gains a factor of more than 4"


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5, 1e7])
def test_in_double_precision(condition: float) -> None:
    """An error of the condition number times rounding, as any method has."""
    X, shift = damped(30, condition, 3)
    (ratio,) = ratios([X[0] - shift * torch.eye(30, dtype=Float)], [shift])
    assert ratio is not None
    Z, fine = inverse_roots(X, shift.expand(3), ratio)
    assert fine.all()
    assert torch.equal(Z, Z.mT)
    assert dense.relative(Z, power_of(X, -0.5)) < 20 * condition * torch.finfo(Float).eps


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_in_single_precision_no_worse_than_eigenvectors(condition: float) -> None:
    X, shift = damped(120, condition)
    single = X.float()
    Z, fine = inverse_roots(single, shift.expand(1), 1 / (1.01 * condition * float(single.norm())))
    values, vectors = torch.linalg.eigh(single)
    usual = (vectors * values.clamp_min(float(shift)).rsqrt().unsqueeze(1)) @ vectors.mT
    wanted = power_of(X, -0.5)
    own, other = dense.relative(Z.double(), wanted), dense.relative(usual.double(), wanted)
    assert bool(fine) == (own < 5e-3) or own < 2e-2, "what is far from right is known to be wrong"
    assert own < 2 * other + 1e-6


def test_what_rounding_hides_is_left_to_others() -> None:
    nan = torch.full((5, 5), torch.nan)
    one, tiny = torch.eye(5), torch.tensor(1e-9)
    assert ratios([one, nan, one], [tiny, tiny + 1, torch.tensor(torch.nan)]) == [None, None, None]
    (found,) = ratios([one], [torch.tensor(0.1)])
    assert found is not None
    assert found < 0.1 / (float(torch.linalg.matrix_norm(one, 2)) + 0.1), "t is above every eigenvalue"


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("batch", [1, 5])
def test_a_tempered_factor_made_in_products_is_the_one_made_of_eigenvectors(batch: int) -> None:
    bases = [spd(12, 1e4, seed) for seed in range(batch)]
    shifts, names = [torch.tensor(1e-3, dtype=Float)] * batch, [("x", "A")] * batch
    own, notices = temper(bases, shifts, names, 0.5, vectors=False)
    wanted, _ = temper(bases, shifts, names, 0.5)
    assert notices == []
    assert all(isinstance(a, ByInverse) and isinstance(b, Tempered) for a, b in zip(own, wanted, strict=True))
    eye = torch.eye(12, dtype=Float)
    for a, b in zip(own, wanted, strict=True):
        assert dense.relative(a.inverse, b.inverse) < 1e-11
        assert dense.relative(a.times(eye), b.times(eye)) < 1e-11


@pytest.mark.usefixtures("_products")
def test_blocks_of_a_net_and_their_state() -> None:
    A, G = factors()
    gamma = torch.tensor(0.3, dtype=Float)
    found, more, notices = damp(LAYERS, A, G, gamma, pi="layer", power=0.5, keep_roots=False)
    wanted, *_ = damp(LAYERS, A, G, gamma, pi="layer", power=0.5)
    assert not notices
    assert more == {"A": [], "G": []}
    again = type(found).from_state(found.state_dict())
    for i, layer in enumerate(LAYERS):
        V = dense.randn(*layer.shape)
        assert dense.relative(found.solve(i, V), wanted.solve(i, V)) < 1e-11
        assert dense.relative(again.multiply(i, V), wanted.multiply(i, V)) < 1e-11
        assert torch.equal(again.solve(i, V), found.solve(i, V))


@pytest.mark.usefixtures("_products")
def test_other_powers_and_roots_have_eigenvectors() -> None:
    bases, shifts, names = [spd(8, 1e3)], [torch.tensor(0.01, dtype=Float)], [("x", "A")]
    for power, vectors in ((0.8, False), (0.5, True)):
        (found,), _ = temper(bases, shifts, names, power, vectors=vectors)
        assert isinstance(found, Tempered)


@pytest.mark.usefixtures("_products")
def test_a_root_that_went_wrong_is_made_of_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "_iterate", lambda Y, steps: torch.full_like(Y, torch.nan))
    bases, shifts = [spd(8, 1e3), spd(5, 1e3)], [torch.tensor(0.01, dtype=Float)] * 2
    names = [("x", "A"), ("y", "A")]
    found, notices = temper(bases, shifts, names, 0.5, vectors=False)
    assert notices == []
    assert all(isinstance(factor, Tempered) for factor in found)


@pytest.mark.usefixtures("_products")
def test_a_factor_that_is_not_finite_is_named() -> None:
    bases = [spd(8, 1e3), torch.full((5, 5), torch.nan, dtype=Float)]
    shifts = [torch.tensor(0.01, dtype=Float)] * 2
    with pytest.raises(NumericalError, match="y: the eigenproblem of G has NaN or infinite entries"):
        temper(bases, shifts, [("x", "A"), ("y", "G")], 0.5, vectors=False)
