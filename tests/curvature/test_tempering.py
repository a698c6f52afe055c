"""Tempered factors."""

from __future__ import annotations

import dense
import pytest
import torch
from test_kronecker import LAYERS, Float, factors
from torch import Tensor

from kfacore.curvature.kronecker import damp
from kfacore.curvature.tempering import temper
from kfacore.errors import NumericalError


def power_of(M: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values**p) @ vectors.T


@pytest.mark.parametrize("power", [0.5, 0.85, 1.0])
def test_tempering_is_a_power_in_units_of_the_damping(power: float) -> None:
    A, _ = factors()
    names = [("a", "A"), ("b", "A")]
    shifts = [torch.tensor(0.2, dtype=Float), torch.tensor(0.05, dtype=Float)]
    found, notices = temper(A, shifts, names, power)
    assert notices == []
    for base, shift, factor in zip(A, shifts, found, strict=True):
        eye = torch.eye(len(base), dtype=Float)
        D, B = shift * power_of((base + shift * eye) / shift, power), factor.color(eye)
        assert dense.relative(factor.times(eye), D) < 1e-12
        assert dense.relative(factor.inverse @ D, eye) < 1e-12
        assert dense.relative(B @ B.T, D) < 1e-12
        assert dense.relative(factor.dual(B.T), eye) < 1e-12, "dual is B^-T"
        assert dense.relative(factor.whiten(factor.whiten(base + shift * eye).T), eye) < 1e-12, "W Xd W^T = I"


def test_a_tempered_block_is_a_power_of_the_damped_block_whatever_pi_is() -> None:
    """The block of a layer is gamma^2 (Ad (x) Gd / gamma^2)^p: pi moves nothing between the two sides."""
    A, G = factors()
    gamma, p = 0.3, 0.7
    plain, *_ = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi="layer")
    found, *_ = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi="layer", power=p)
    for i, layer in enumerate(LAYERS):
        eye = [torch.eye(d, dtype=Float) for d in (layer.d_in, layer.d_out)]
        block = torch.kron(plain.A[i].times(eye[0]), plain.G[i].times(eye[1]))
        wanted = gamma**2 * power_of(block / gamma**2, p)
        assert dense.relative(torch.kron(found.A[i].times(eye[0]), found.G[i].times(eye[1])), wanted) < 1e-12
        assert dense.relative(torch.kron(found.A[i].inverse, found.G[i].inverse), torch.linalg.inv(wanted)) < 1e-10


def test_tempering_keeps_the_units_of_the_objective() -> None:
    """F times c, with gamma^2 times c, is the tempered F times c."""
    A, G = factors()
    c = 7.0
    one, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi="layer", power=0.85)
    other, *_ = damp(LAYERS, A, [c * g for g in G], torch.tensor(0.3 * c**0.5, dtype=Float), pi="layer", power=0.85)
    for i, layer in enumerate(LAYERS):
        V = dense.randn(*layer.shape)
        assert dense.relative(other.multiply(i, V), c * one.multiply(i, V)) < 1e-12


def test_tempering_needs_damping() -> None:
    A, G = factors()
    with pytest.raises(NumericalError, match=r"a: factor A cannot be tempered with a damping of 0; raise the damping"):
        damp(LAYERS, A, G, torch.tensor(0.0, dtype=Float), pi="layer", power=0.85)


def test_tempering_a_factor_with_many_zero_rows_in_single_precision() -> None:
    """MNIST's border pixels: repeated eigenvalues, on which single-precision routines may fail."""
    X = torch.zeros(60, 300)
    X[:, 100:] = torch.rand(60, 200, generator=torch.Generator().manual_seed(0))
    base, shift = X.T @ X / len(X), torch.tensor(1e-3, dtype=Float)
    (factor,), _ = temper([base], [shift], [("a", "A")], 0.85)
    (wanted,), _ = temper([base.double()], [shift], [("a", "A")], 0.85)
    eye = torch.eye(len(base))
    assert dense.relative(factor.times(eye).double(), wanted.times(eye.double())) < 1e-5
    # The largest entries of the inverse belong to the smallest eigenvalues, known to eps * |base| / shift.
    limit = 10 * torch.finfo(base.dtype).eps * float(base.norm() / shift)
    assert dense.relative(factor.inverse.double(), wanted.inverse) < limit


def test_an_eigenproblem_that_fails_is_tempered_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    A, _ = factors()
    A, shifts = [a.float() for a in A], [torch.tensor(0.2, dtype=Float)] * 2
    names = [("a", "A"), ("b", "A")]
    wanted, _ = temper(A, shifts, names, 0.85)
    eigh = torch.linalg.eigh

    def fails(M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(M)
        return (values * torch.nan, vectors) if M.dtype == torch.float32 and len(M) == 3 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found, notices = temper(A, shifts, names, 0.85)
    assert [str(notice) for notice in notices] == ["b: eigenproblem of A failed in float32; used double precision"]
    for factor, expected in zip(found, wanted, strict=True):
        eye = torch.eye(len(factor.rows))
        assert dense.relative(factor.times(eye), expected.times(eye)) < 1e-5
        assert dense.relative(factor.inverse, expected.inverse) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_small_factors_of_one_size_are_each_what_they_are_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [5, 16, 5, 33, 5, 5, 33]
    bases = [dense.randn(d, d, seed=i).to(dtype) for i, d in enumerate(sizes)]
    bases = [0.5 * (X @ X.T + (X @ X.T).T) for X in bases]
    shifts = [torch.tensor(0.1 + 0.1 * i, dtype=torch.float64) for i in range(len(sizes))]
    names = [(str(i), "A") for i in range(len(sizes))]
    found, notices = temper(bases, shifts, names, 0.7)
    assert notices == []
    limit = 1e4 * torch.finfo(dtype).eps
    alone = [temper([base], [shift], [name], 0.7)[0][0] for base, shift, name in zip(bases, shifts, names, strict=True)]
    for a, b, d in zip(found, alone, sizes, strict=True):
        eye = torch.eye(d, dtype=dtype)
        assert dense.relative(a.inverse, b.inverse) < limit
        assert dense.relative(a.times(eye), b.times(eye)) < limit
        assert dense.relative(a.damped, b.damped) < limit
    if dtype == torch.float64:
        return
    real = torch.linalg.eigh

    def eigh(M: torch.Tensor) -> object:
        if M.dim() == 3 or M.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    again, notices = temper(bases, shifts, names, 0.7)
    assert len(notices) == len(sizes)
    assert all(dense.relative(a.inverse, b.inverse) < limit for a, b in zip(again, alone, strict=True))
