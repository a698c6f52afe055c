"""Factors in single precision on a device: as exact as on the CPU, whichever way they are made there."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor
from waits import DEVICES

from kfacore.curvature.linalg import eigh_psd
from kfacore.curvature.tempering import temper


def factor(d: int) -> Tensor:
    """As gradients have them: a few large eigenvalues, and most of them near nothing; (d, d) float64."""
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(2 * d, d, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0, -3, d, dtype=torch.float64)
    mixed = rows @ torch.randn(d, d, generator=generator, dtype=torch.float64)
    return mixed.T @ mixed / mixed.square().sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [20, 100, 250, 500, 600])
def test_eigenvectors(device: str, size: int) -> None:
    """Neither a notice nor vectors that are not orthogonal: CUDA's float32 solver of 32 to 512 rows is off by 6e-3."""
    X = (factor(size) + 1e-4 * torch.eye(size, dtype=torch.float64)).float().to(device)
    values, vectors, notices = eigh_psd(X, "x", "A")
    assert notices == []
    assert values.dtype == vectors.dtype == torch.float32
    Q, X64 = vectors.double(), X.double()
    eye = torch.eye(size, dtype=torch.float64, device=device)
    assert dense.relative(Q.T @ Q, eye) < 1e-5
    assert dense.relative((Q * values.double()) @ Q.T, X64) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("sizes", [[600, 300, 40], [24] * 6])
def test_square_roots(device: str, vectors: bool, sizes: list[int]) -> None:
    bases = [factor(size) for size in sizes]
    shifts, names = [torch.tensor(1e-4)] * len(sizes), [("x", "A")] * len(sizes)
    wanted, _ = temper(bases, [shift.double() for shift in shifts], names, 0.5)
    placed = [base.float().to(device) for base in bases], [shift.to(device) for shift in shifts]
    found, notices = temper(*placed, names, 0.5, vectors=vectors)
    assert notices == []
    for a, b in zip(found, wanted, strict=True):
        assert dense.relative(a.inverse.double().cpu(), b.inverse) < 2e-3
