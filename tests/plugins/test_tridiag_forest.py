"""The tridiagonal form over any forest of pairs, against the dense precision matrix of a Gaussian Markov forest."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.approx.tridiag import BlockTridiagonal, BlockTridiagonalInverse
from kfacore.errors import ConfigError
from kfacore.plugin import PiRule
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments

Float = torch.float64
R = 3
BLOCKS = [
    Block(f"layer{i}", d_in, d_out, False) for i, (d_in, d_out) in enumerate([(2, 3), (3, 1), (2, 2), (4, 2), (1, 3)])
]
FORESTS = {
    "chain": [(0, 1), (1, 2), (2, 3), (3, 4)],
    "chain, pairs turned around": [(1, 0), (2, 1), (2, 3), (4, 3)],
    "star": [(2, 0), (2, 1), (3, 2), (2, 4)],
    "star around the first": [(0, 1), (0, 2), (3, 0), (0, 4)],
    "two trees": [(4, 0), (0, 2), (3, 1)],
    "one pair": [(1, 4)],
    "none": [],
}


def samples(seed: int = 0) -> list[LayerSamples]:
    """Rows of all blocks mixed from few common sources, so that every two blocks are correlated."""
    n = 8 * R
    inputs, gradients = dense.randn(n, 4, seed=seed), dense.randn(2, n, 3, seed=seed + 50)
    found = []
    for i, block in enumerate(BLOCKS):
        x = inputs @ dense.randn(4, block.d_in, seed=100 + i) + 0.5 * dense.randn(n, block.d_in, seed=seed + 10 * i)
        g = gradients @ dense.randn(3, block.d_out, seed=200 + i) + 0.5 * dense.randn(2, n, block.d_out, seed=seed + i)
        found.append(LayerSamples(x, g, R))
    return found


def covariance(s: list[LayerSamples], i: int, j: int, gamma: float, pi: PiRule) -> Tensor:
    """A (x) G of two blocks, damped where they are one."""
    A = s[i].inputs.T @ s[j].inputs / len(s[i].inputs)
    G = torch.einsum("kri,krj->ij", s[i].gradients, s[j].gradients) / s[i].cases
    if i == j:
        split = float((A.trace() / len(A) / (G.trace() / len(G))).sqrt()) if pi == "layer" else 1.0
        A = A + split * gamma * torch.eye(len(A), dtype=Float)
        G = G + gamma / split * torch.eye(len(G), dtype=Float)
    return torch.kron(A, G)


def precision(s: list[LayerSamples], pairs: list[tuple[int, int]], gamma: float, pi: PiRule = "layer") -> Tensor:
    """Sum of the pairs' joint precisions, less those of nodes that are counted more than once (Lauritzen 1996)."""
    sizes = [block.size for block in BLOCKS]
    where = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    found = torch.zeros(sum(sizes), sum(sizes), dtype=Float)
    for i, span in enumerate(where):
        degree = sum(i in pair for pair in pairs)
        found[span, span] += (1 - degree) * torch.linalg.inv(covariance(s, i, i, gamma, pi))
    for i, j in pairs:
        joint = torch.cat([torch.cat([covariance(s, a, b, gamma, pi) for b in (i, j)], 1) for a in (i, j)])
        inverse, k = torch.linalg.inv(joint), sizes[i]
        found[where[i], where[i]] += inverse[:k, :k]
        found[where[i], where[j]] += inverse[:k, k:]
        found[where[j], where[i]] += inverse[k:, :k]
        found[where[j], where[j]] += inverse[k:, k:]
    return found


def inverse_of(pairs: list[tuple[int, int]], gamma: float = 0.3, **options: float) -> BlockTridiagonalInverse:
    approx = BlockTridiagonal(BlockTridiagonalConfig(**{"power": 1.0, **options}))
    moments = Moments(approx.moments, BLOCKS, torch.zeros((), dtype=Float), pairs)
    moments.update(samples(), 0.95)
    return approx.factorise(moments).damped(torch.tensor(gamma, dtype=Float))


@pytest.mark.parametrize("name", FORESTS)
def test_it_is_the_precision_of_the_gaussian_markov_forest(name: str) -> None:
    for gamma in (0.05, 0.5):
        wanted, found = precision(samples(), FORESTS[name], gamma), inverse_of(FORESTS[name], gamma)
        assert dense.relative(found.dense(), wanted) < 1e-9
        assert dense.relative(found.dense(inverse=False), torch.linalg.inv(wanted)) < 1e-9


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("power", [1.0, 0.6])
def test_solve_and_multiply_undo_each_other_and_survive_a_checkpoint(name: str, power: float) -> None:
    found = inverse_of(FORESTS[name], power=power)
    v = [dense.randn(*block.shape, seed=i) for i, block in enumerate(BLOCKS)]
    for a, b in zip(found.multiply(found.solve(v)), v, strict=True):
        assert dense.relative(a, b) < 1e-10
    again = BlockTridiagonal().load_inverse(found.state_dict(), BLOCKS)
    assert all(torch.equal(a, b) for a, b in zip(again.solve(v), found.solve(v), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again.multiply(v), found.multiply(v), strict=True))


def test_without_pairs_it_is_block_diagonal() -> None:
    approx = BlockDiagonal()
    moments = Moments(approx.moments, BLOCKS, torch.zeros((), dtype=Float))
    moments.update(samples(), 0.95)
    power = approx.config.power
    wanted = approx.factorise(moments).damped(torch.tensor(0.3, dtype=Float))
    assert torch.equal(inverse_of([], power=power).dense(), wanted.dense())


def test_a_pair_turned_around_is_the_same_pair() -> None:
    a, b = inverse_of([(0, 3), (3, 1)]), inverse_of([(3, 0), (1, 3)])
    assert dense.relative(a.dense(), b.dense()) < 1e-12


def test_pairs_with_a_circle_are_refused() -> None:
    with pytest.raises(ConfigError, match="are no forest"):
        inverse_of([(0, 1), (1, 2), (0, 2)])
