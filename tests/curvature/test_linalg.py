"""Checked factorisations: retried in double precision, then with jitter, and named when all fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from torch import Tensor

from kfacore.curvature.linalg import eigh_psd, factor_spd, pi_of, together
from kfacore.errors import NumericalError

Single, Double = torch.float32, torch.float64


def spd(d: int, dtype: torch.dtype = Double, rank: int | None = None) -> Tensor:
    X = dense.randn(d, rank or 2 * d)
    return (X @ X.T / X.shape[1]).to(dtype)


def border_pixels(dtype: torch.dtype) -> Tensor:
    """Uncentred second moments of images whose border is always 0: 784 + 1 inputs, hundreds of zero rows, low rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(125, 28, 28)
    images[:, 5:23, 6:22] = torch.rand(125, 18, 16, generator=generator)
    rows = torch.cat([images.flatten(1), torch.ones(125, 1)], 1).to(dtype)
    A = rows.T @ rows / len(rows)
    assert int((A.diagonal() == 0).sum()) == 784 - 18 * 16
    return A


def shift(value: float) -> Tensor:
    return torch.tensor(value, dtype=Double)


@pytest.mark.parametrize("dtype", [Single, Double])
def test_factor_and_inverse(dtype: torch.dtype) -> None:
    bases, shifts = [spd(5, dtype), spd(3, dtype)], [shift(0.1), shift(2.0)]
    results, lower, notices = factor_spd(bases, shifts, [("a", "A"), ("b", "G")])
    assert notices == []
    for base, s, result, L in zip(bases, shifts, results, lower, strict=True):
        damped = base.double() + s * torch.eye(len(base), dtype=Double)
        tolerance = 1e-5 if dtype == Single else 1e-12
        assert dense.relative(result.inverse, torch.linalg.inv(damped)) < tolerance
        assert dense.relative(L @ L.T, damped) < tolerance
        assert dense.relative(result.times(torch.eye(len(base), dtype=dtype)), damped) < tolerance
        assert result.inverse.dtype == L.dtype == dtype
        assert torch.equal(result.base, base)


@pytest.mark.parametrize("gamma", [1e-5, 1e-3, 0.1])
def test_hundreds_of_zero_rows_in_single_precision(gamma: float) -> None:
    A = border_pixels(Single)
    (result,), (L,), _ = factor_spd([A], [shift(gamma)], [("0", "A")])
    assert bool(torch.isfinite(result.inverse).all())
    assert bool(torch.isfinite(L).all())
    total = A.double() + result.shift.double() * torch.eye(785, dtype=Double)
    assert (
        dense.relative(total @ result.inverse.double(), torch.eye(785, dtype=Double)) < 3e-7 * float(A.trace()) / gamma
    )


def test_a_singular_factor_gets_jitter_and_a_notice() -> None:
    singular = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=Double))
    results, lower, notices = factor_spd([spd(6), singular], [shift(0.1), shift(0.0)], [("live", "A"), ("dead", "G")])
    (notice,) = notices
    assert str(notice) == (
        "dead: factor G could not be factorised in float64; used double precision and jitter 1e-07 of its mean diagonal"
    )
    damped = singular + 0.75e-7 * torch.eye(4, dtype=Double)
    assert dense.relative(results[1].inverse, torch.linalg.inv(damped)) < 1e-12
    assert dense.relative(lower[1] @ lower[1].T, damped) < 1e-12


def test_nothing_can_be_made_of_a_zero_factor_without_damping() -> None:
    with pytest.raises(NumericalError, match=r"^dead: factor G could not be factorised even .*; raise the damping"):
        factor_spd([torch.zeros(4, 4)], [shift(0.0)], [("dead", "G")])


def test_an_undamped_indefinite_factor_needs_enough_jitter() -> None:
    """Slightly negative by rounding: the jitter grows until it holds, and the shift says how much it was."""
    base = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-6], dtype=Double))
    (result,), _, (notice,) = factor_spd([base], [shift(0.0)], [("x", "A")])
    assert "jitter 1e-05" in str(notice)
    assert float(result.shift) == pytest.approx(1e-5 * 0.75, rel=1e-5)
    eye = torch.eye(4, dtype=Double)
    assert dense.relative(result.times(eye) @ result.inverse, eye) < 1e-10


def test_hopeless_factors_are_named() -> None:
    with pytest.raises(NumericalError, match=r"^bad: factor G could not be factorised even with jitter 0\.1"):
        factor_spd([-spd(4)], [shift(0.0)], [("bad", "G")])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_named(value: float) -> None:
    broken = spd(4)
    broken[1, 2] = broken[2, 1] = value
    with pytest.raises(NumericalError, match=r"^second: factor G has NaN or infinite entries"):
        factor_spd([spd(4), broken], [shift(0.1)] * 2, [("first", "A"), ("second", "G")])
    with pytest.raises(NumericalError, match=r"^first: factor A has NaN"):
        factor_spd([spd(4)], [shift(torch.nan)], [("first", "A")])


def fail_in(monkeypatch: pytest.MonkeyPatch, dtypes: set[torch.dtype], failing: Callable[[Tensor], Any]) -> list[Any]:
    """torch.linalg.eigh fails in the given dtypes; returns the dtypes it was called with."""
    real, calls = torch.linalg.eigh, []

    def eigh(M: Tensor) -> Any:
        calls.append(M.dtype)
        return failing(M) if M.dtype in dtypes else real(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def raises(M: Tensor) -> Any:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


REAL_EIGH = torch.linalg.eigh


def returns_nan(M: Tensor) -> Any:
    return M.diagonal() * torch.nan, M * torch.nan


def nan_vectors(M: Tensor) -> Any:
    values, vectors = REAL_EIGH(M)
    vectors[0, 0] = torch.nan
    return values, vectors


def wrong_values(M: Tensor) -> Any:
    values, vectors = REAL_EIGH(M)
    return values * 1.01, vectors


def wrong_vectors(M: Tensor) -> Any:
    """The trace is right."""
    values, vectors = REAL_EIGH(M)
    return values, vectors.roll(1, 1)


FAILURES = [raises, returns_nan, nan_vectors, wrong_values, wrong_vectors]


@pytest.mark.parametrize("failing", FAILURES)
def test_eigenproblem_is_tried_again_in_double(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail_in(monkeypatch, {Single}, failing)
    M = spd(7, Single)
    values, vectors, (notice,) = eigh_psd(M, "layer 3", "Ax")
    assert calls == [Single, Double]
    assert str(notice) == "layer 3: eigenproblem of Ax failed in float32; used double precision"
    assert values.dtype == vectors.dtype == Single
    assert dense.relative(vectors @ values.diag() @ vectors.T, M) < 1e-5


@pytest.mark.parametrize("failing", FAILURES)
def test_an_eigenproblem_that_always_fails_is_named(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, {Single, Double}, failing)
    with pytest.raises(NumericalError, match=r"^layer 3: the eigenproblem of Ax failed in double precision"):
        eigh_psd(spd(7, Single), "layer 3", "Ax")


@pytest.mark.parametrize("dtype", [Single, Double])
@pytest.mark.parametrize("rank", [1, 5, 60])
def test_healthy_eigenproblems_pass_the_checks(dtype: torch.dtype, rank: int) -> None:
    M = spd(60, dtype, rank)
    values, vectors, notices = eigh_psd(M, "x", "Ax")
    assert notices == []
    assert dense.relative(vectors @ values.diag() @ vectors.T, M) < (1e-5 if dtype == Single else 1e-13)


def test_zero_matrix_has_an_eigenproblem_too() -> None:
    values, vectors, notices = eigh_psd(torch.zeros(4, 4), "x", "Ax")
    assert not bool(values.any())
    assert bool(torch.isfinite(vectors).all())
    assert notices == []


def test_the_matrix_that_broke_single_precision() -> None:
    """Rank-deficient with hundreds of zero rows (method, section 9): right, whatever LAPACK does in float32."""
    A = border_pixels(Single)
    values, vectors, _ = eigh_psd(A, "0", "Ax")
    assert dense.relative(vectors.double() @ values.double().diag() @ vectors.T.double(), A) < 1e-5


def test_eigenproblem_of_nan_is_named() -> None:
    M = spd(4)
    M[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"^x: the eigenproblem of Ax"):
        eigh_psd(M, "x", "Ax")


def test_pi_balances_the_traces() -> None:
    A, G = [spd(5), spd(4)], [100 * spd(3), spd(2)]
    wanted = [float(a.diagonal().mean() / g.diagonal().mean()) ** 0.5 for a, g in zip(A, G, strict=True)]
    assert [float(pi) for pi in pi_of(A, G)] == pytest.approx(wanted, rel=1e-14)
    assert [float(pi) for pi in pi_of(A, G, "net")] == pytest.approx([(wanted[0] * wanted[1]) ** 0.5] * 2, rel=1e-14)
    assert [float(pi) for pi in pi_of(A, G, None)] == [1.0, 1.0]


@pytest.mark.parametrize("c", [0.01, 7.0])
def test_pi_follows_the_scale_of_the_objective(c: float) -> None:
    """F times c is G times c, and gamma times sqrt(c): pi gamma stays, gamma / pi is times c."""
    A, G = [spd(5), spd(4)], [100 * spd(3), spd(2)]
    for rule in ("layer", "net"):
        before, after = pi_of(A, G, rule), pi_of(A, [c * g for g in G], rule)
        assert [float(b) for b in after] == pytest.approx([float(a) / c**0.5 for a in before], rel=1e-13)


def test_pi_of_dead_layers_is_one() -> None:
    zero, A = torch.zeros(3, 3, dtype=Double), spd(3)
    assert [float(pi) for pi in pi_of([A, zero, zero], [zero, A, zero])] == [1.0] * 3
    assert float(pi_of([A, zero], [4 * A, A], "net")[1]) == pytest.approx(0.5, rel=1e-14)
    assert [float(pi) for pi in pi_of([zero], [A], "net")] == [1.0]


@pytest.mark.parametrize("keep_lower", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_small_factors_of_one_size_are_each_what_they_are_alone(dtype: torch.dtype, keep_lower: bool) -> None:
    sizes = [5, 16, 5, 33, 5, 200, 5, 33, 16, 33, 33]
    bases = []
    for i, d in enumerate(sizes):
        X = dense.randn(2 * d, d, seed=i).to(dtype)
        bases.append(0.5 * (X.T @ X + (X.T @ X).T))
    bases[4] = torch.diag(torch.tensor([1.0, 0, 0, 1, 1], dtype=dtype))  # fails, and is tried again alone
    shifts = [torch.tensor(0.1 * (i != 4)) for i in range(len(sizes))]
    names = [(str(i), "A") for i in range(len(sizes))]
    assert together(bases) == [[0, 2, 4, 6], [1], [3, 7, 9, 10], [5], [8]]
    found, lower, notices = factor_spd(bases, shifts, names, keep_lower=keep_lower)
    assert [notice.layer for notice in notices] == ["4"]
    assert len(lower) == (len(sizes) if keep_lower else 0)
    for i, base in enumerate(bases):
        (one,), L, _ = factor_spd([base], [shifts[i]], [names[i]], keep_lower=keep_lower)
        limit = 1e3 * torch.finfo(dtype).eps
        assert dense.relative(found[i].inverse, one.inverse) < limit
        assert torch.equal(found[i].inverse, found[i].inverse.T)
        assert float(found[i].shift) == float(one.shift)
        if keep_lower:
            assert dense.relative(lower[i].tril(), L[0].tril()) < limit
