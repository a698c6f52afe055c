"""Damped Kronecker factors."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfacore.errors import NumericalError
from kfacore.kronecker import DampedFactors, damp, symmetric, temper
from kfacore.layers import LayerInfo

LAYERS = [LayerInfo("a", 4, 3, True), LayerInfo("b", 3, 2, False)]
Float = torch.float64


def factors() -> tuple[list[Tensor], list[Tensor]]:
    def make(d: int, seed: int) -> Tensor:
        X = dense.randn(2 * d, d, seed=seed)
        return X.T @ X / len(X)

    return [make(4, 0), make(3, 1)], [3.0 * make(3, 2), 0.01 * make(2, 3)]


@pytest.mark.parametrize("pi", [True, False])
@pytest.mark.parametrize("gamma", [0.01, 1.0])
def test_factored_tikhonov(gamma: float, pi: bool) -> None:
    A, G = factors()
    found, lower, _, notices = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi=pi)
    assert notices == ()
    V = [dense.randn(*layer.shape) for layer in LAYERS]
    for i, layer in enumerate(LAYERS):
        split = float(((A[i].trace() / layer.d_in) / (G[i].trace() / layer.d_out)) ** 0.5) if pi else 1.0
        Ad = A[i] + split * gamma * torch.eye(layer.d_in, dtype=Float)
        Gd = G[i] + gamma / split * torch.eye(layer.d_out, dtype=Float)
        assert dense.relative(lower["A"][i] @ lower["A"][i].T, Ad) < 1e-13
        assert dense.relative(lower["G"][i] @ lower["G"][i].T, Gd) < 1e-13
        assert dense.relative(found.solve(i, V[i]), torch.linalg.inv(Gd) @ V[i] @ torch.linalg.inv(Ad)) < 1e-10
        assert dense.relative(found.multiply(i, V[i]), Gd @ V[i] @ Ad) < 1e-13


def test_damping_of_the_product_is_gamma_squared() -> None:
    """(pi gamma) (gamma / pi) = gamma^2 whatever pi is."""
    A, G = factors()
    found, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi=True)
    for a, g in zip(found.A, found.G, strict=True):
        assert float(a.shift * g.shift) == pytest.approx(0.09, rel=1e-14)


def test_dead_layer_is_plain_damping() -> None:
    A, G = factors()
    G[1] = torch.zeros_like(G[1])
    found, _, _, notices = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi=True)
    assert notices == ()
    assert float(found.A[1].shift) == float(found.G[1].shift) == 0.3


def test_symmetric_copies() -> None:
    value = dense.randn(4, 4)
    (copy,) = symmetric([value])
    assert torch.equal(copy, copy.T)
    assert dense.relative(copy, (value + value.T) / 2) < 1e-15
    kept = copy.clone()
    value.zero_()
    assert torch.equal(copy, kept)


def test_state_round_trip() -> None:
    A, G = factors()
    found, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi=True)
    again = DampedFactors.from_state(found.state_dict())
    V = dense.randn(*LAYERS[0].shape)
    assert torch.equal(again.solve(0, V), found.solve(0, V))
    assert torch.equal(again.multiply(0, V), found.multiply(0, V))


def test_notices_name_layer_and_factor() -> None:
    A, G = factors()
    G[0] = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=Float))
    *_, notices = damp(LAYERS, A, G, torch.tensor(0.0, dtype=Float), pi=False)
    assert [notice.layer for notice in notices] == ["a"]
    assert "factor G" in notices[0].message


# --- tempering ---


def power_of(M: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values**p) @ vectors.T


@pytest.mark.parametrize("power", [0.5, 0.85, 1.0])
def test_tempering_is_a_power_in_units_of_the_damping(power: float) -> None:
    A, _ = factors()
    names = [("a", "A"), ("b", "A")]
    shifts = [torch.tensor(0.2, dtype=Float), torch.tensor(0.05, dtype=Float)]
    D, R, notices = temper(A, shifts, names, power)
    assert notices == []
    for base, shift, d, r in zip(A, shifts, D, R, strict=True):
        Xd = base + shift * torch.eye(len(base), dtype=Float)
        assert dense.relative(d, shift * power_of(Xd / shift, power)) < 1e-12
        assert dense.relative(r @ Xd @ r, d) < 1e-12, "R carries Xd over to D"


def test_a_tempered_block_is_a_power_of_the_damped_block_whatever_pi_is() -> None:
    """The block of a layer is gamma^2 (Ad (x) Gd / gamma^2)^p: pi moves nothing between the two sides."""
    A, G = factors()
    gamma, p = 0.3, 0.7
    plain, *_ = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi=True)
    found, *_ = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi=True, power=p)
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
    one, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi=True, power=0.85)
    other, *_ = damp(LAYERS, A, [c * g for g in G], torch.tensor(0.3 * c**0.5, dtype=Float), pi=True, power=0.85)
    for i, layer in enumerate(LAYERS):
        V = dense.randn(*layer.shape)
        assert dense.relative(other.multiply(i, V), c * one.multiply(i, V)) < 1e-12


def test_tempering_needs_damping() -> None:
    A, G = factors()
    with pytest.raises(NumericalError, match=r"a: factor A cannot be tempered with a damping of 0; raise the damping"):
        damp(LAYERS, A, G, torch.tensor(0.0, dtype=Float), pi=True, power=0.85)


def test_tempering_a_factor_with_many_zero_rows_in_single_precision() -> None:
    """MNIST's border pixels: repeated eigenvalues, on which single-precision routines may fail."""
    X = torch.zeros(60, 300)
    X[:, 100:] = torch.rand(60, 200, generator=torch.Generator().manual_seed(0))
    base, shift = X.T @ X / len(X), torch.tensor(1e-3, dtype=Float)
    (D,), (R,), _ = temper([base], [shift], [("a", "A")], 0.85)
    (wanted,), (root,), _ = temper([base.double()], [shift], [("a", "A")], 0.85)
    assert dense.relative(D.double(), wanted) < 1e-5
    # R's largest entries belong to the smallest eigenvalues, known to eps * |base| / shift.
    assert dense.relative(R.double(), root) < 10 * torch.finfo(base.dtype).eps * float(base.norm() / shift)


def test_an_eigenproblem_that_fails_is_tempered_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    A, _ = factors()
    A, shifts = [a.float() for a in A], [torch.tensor(0.2, dtype=Float)] * 2
    names = [("a", "A"), ("b", "A")]
    wanted, roots, _ = temper(A, shifts, names, 0.85)
    eigh = torch.linalg.eigh

    def fails(M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(M)
        return (values * torch.nan, vectors) if M.dtype == torch.float32 and len(M) == 3 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    D, R, notices = temper(A, shifts, names, 0.85)
    assert [str(notice) for notice in notices] == ["b: eigenproblem of A failed in float32; used double precision"]
    for found, expected in zip([*D, *R], [*wanted, *roots], strict=True):
        assert dense.relative(found, expected) < 1e-5
    assert temper(A, shifts, names, 0.85, keep_roots=False)[1] == []
