"""Damped Kronecker factors."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfacore.curvature.kronecker import DampedFactors, damp, ready, symmetric
from kfacore.plugin import PiRule
from kfacore.roles.block import Block

LAYERS = [Block("a", 4, 3, True), Block("b", 3, 2, False)]
Float = torch.float64


def factors() -> tuple[list[Tensor], list[Tensor]]:
    def make(d: int, seed: int) -> Tensor:
        X = dense.randn(2 * d, d, seed=seed)
        return X.T @ X / len(X)

    return [make(4, 0), make(3, 1)], [3.0 * make(3, 2), 0.01 * make(2, 3)]


@pytest.mark.parametrize("pi", ["layer", "net", None])
@pytest.mark.parametrize("gamma", [0.01, 1.0])
def test_factored_tikhonov(gamma: float, pi: PiRule) -> None:
    A, G = factors()
    found, roots, notices = damp(LAYERS, A, G, torch.tensor(gamma, dtype=Float), pi=pi)
    assert notices == ()
    V = [dense.randn(*layer.shape) for layer in LAYERS]
    splits = [float(((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5) for a, g in zip(A, G, strict=True)]
    if pi != "layer":
        splits = [1.0 if pi is None else (splits[0] * splits[1]) ** 0.5] * 2
    for i, (layer, split) in enumerate(zip(LAYERS, splits, strict=True)):
        Ad = A[i] + split * gamma * torch.eye(layer.d_in, dtype=Float)
        Gd = G[i] + gamma / split * torch.eye(layer.d_out, dtype=Float)
        for root, wanted in ((roots["A"][i], Ad), (roots["G"][i], Gd)):
            B = root.color(torch.eye(len(wanted), dtype=Float))
            assert dense.relative(B @ B.T, wanted) < 1e-13
        assert dense.relative(found.solve(i, V[i]), torch.linalg.inv(Gd) @ V[i] @ torch.linalg.inv(Ad)) < 1e-10
        assert dense.relative(found.multiply(i, V[i]), Gd @ V[i] @ Ad) < 1e-13


def test_damping_of_the_product_is_gamma_squared() -> None:
    """(pi gamma) (gamma / pi) = gamma^2 whatever pi is."""
    A, G = factors()
    found, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi="layer")
    for a, g in zip(found.A, found.G, strict=True):
        assert float(a.shift * g.shift) == pytest.approx(0.09, rel=1e-14)


def test_dead_layer_is_plain_damping() -> None:
    A, G = factors()
    G[1] = torch.zeros_like(G[1])
    found, _, notices = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi="layer")
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


def test_only_factors_that_are_kept_are_copied() -> None:
    A, _ = factors()
    assert all(mine is not given and torch.equal(mine, given) for mine, given in zip(ready(A, 1.0), A, strict=True))
    assert all(mine is given for mine, given in zip(ready(A, 0.85), A, strict=True))


@pytest.mark.parametrize("power", [0.85, 1.0])
def test_state_round_trip(power: float) -> None:
    A, G = factors()
    found, *_ = damp(LAYERS, A, G, torch.tensor(0.3, dtype=Float), pi="layer", power=power)
    again = DampedFactors.from_state(found.state_dict())
    V = dense.randn(*LAYERS[0].shape)
    assert torch.equal(again.solve(0, V), found.solve(0, V))
    assert torch.equal(again.multiply(0, V), found.multiply(0, V))


def test_notices_name_layer_and_factor() -> None:
    A, G = factors()
    G[0] = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=Float))
    *_, notices = damp(LAYERS, A, G, torch.tensor(0.0, dtype=Float), pi=None)
    assert [notice.layer for notice in notices] == ["a"]
    assert "factor G" in notices[0].message
