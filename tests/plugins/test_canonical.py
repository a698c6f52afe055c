"""Canonical correlations of a pair of layers, and the correction that they make, against dense matrices."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfac_plugins.approx.canonical import canonical
from kfacore.curvature.spd import CholeskyRoot, Root
from kfacore.curvature.tempering import temper

Float = torch.float64
SHAPES = [(5, 3), (3, 5), (4, 4)]


def moments(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Damped moments of two correlated sets of variables, and their cross moment."""
    first, second = shape
    mixed = dense.randn(40, first + second, seed=1) @ dense.randn(first + second, first + second, seed=2)
    joint = mixed.T @ mixed / len(mixed) + 0.3 * torch.eye(first + second, dtype=Float)
    return joint[:first, :first], joint[first:, first:], joint[:first, first:]


def roots(here: Tensor, following: Tensor) -> tuple[Root, Root]:
    return CholeskyRoot(torch.linalg.cholesky(here)), CholeskyRoot(torch.linalg.cholesky(following))


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_correlations_are_those_of_the_textbook(shape: tuple[int, int]) -> None:
    """Eigenvalues of C11^-1 C12 C22^-1 C21."""
    here, following, cross = moments(shape)
    pair, notices = canonical(cross, *roots(here, following), 0.0, "0", "Ax")
    product = torch.linalg.inv(here) @ cross @ torch.linalg.inv(following) @ cross.T
    wanted = torch.linalg.eigvals(product).real.sort().values[-min(shape) :]
    assert notices == []
    assert dense.relative(pair.s, wanted) < 1e-12
    assert float(pair.s.min()) > 0.0
    assert float(pair.s.max()) < 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_make_up_the_cross_moment(shape: tuple[int, int]) -> None:
    """Ax_i Ad_{i+1}^-1 = Ad_i K diag(r) Z^T, with r in one of the two."""
    here, following, cross = moments(shape)
    pair, _ = canonical(cross, *roots(here, following), 0.0, "0", "Ax")
    assert dense.relative(here @ pair.K @ pair.Z.T, cross @ torch.linalg.inv(following)) < 1e-12
    assert dense.relative(pair.K.T @ here @ pair.K, torch.diag(pair.share("K"))) < 1e-12
    assert dense.relative(pair.Z.T @ following @ pair.Z, torch.diag(pair.share("Z"))) < 1e-12
    assert dense.relative(pair.share("K") * pair.share("Z"), pair.s) < 1e-15


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tolerance_keeps_the_largest(shape: tuple[int, int]) -> None:
    here, following, cross = moments(shape)
    whole, _ = canonical(cross, *roots(here, following), 0.0, "0", "Ax")
    middle = float(whole.s[-2] + whole.s[-1]) / 2
    one, _ = canonical(cross, *roots(here, following), middle, "0", "Ax")
    assert one.K.shape == (shape[0], 1)
    assert one.Z.shape == (shape[1], 1)
    assert dense.relative(one.s, whole.s[-1:]) < 1e-12
    assert dense.relative(one.K @ one.Z.T, whole.K[:, -1:] @ whole.Z[:, -1:].T) < 1e-10
    none, _ = canonical(cross, *roots(here, following), 1.0, "0", "Ax")
    assert none.K.shape == (shape[0], 0)
    assert none.Z.shape == (shape[1], 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_tempered_layers_keep_their_correlations(shape: tuple[int, int]) -> None:
    """The cross moment becomes R_i X R_{i+1} with R = D^1/2 Xd^-1/2, whichever roots are taken."""
    here, following, cross = moments(shape)
    shifts = [torch.tensor(0.3, dtype=Float)] * 2
    bases = [M - 0.3 * torch.eye(len(M), dtype=Float) for M in (here, following)]
    (D, E), _ = temper(bases, shifts, [("0", "A"), ("1", "A")], 0.7)
    pair, _ = canonical(cross, D, E, 0.0, "0", "Ax")
    plain, _ = canonical(cross, *roots(here, following), 0.0, "0", "Ax")
    assert dense.relative(pair.s, plain.s) < 1e-11
    carried = D.color(D.whiten(cross @ E.whiten(torch.eye(shape[1], dtype=Float)).T))  # B_i W_i X W_{i+1}^T
    eye = torch.eye(shape[0], dtype=Float)
    wanted = carried @ E.dual(torch.eye(shape[1], dtype=Float)).T  # ... B_{i+1}^-1
    assert dense.relative(D.times(eye) @ pair.K @ pair.Z.T, wanted) < 1e-11
