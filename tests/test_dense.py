"""Both approximations against the dense matrices of their definitions, float64, 1e-10 relative."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import dense
import pytest
import torch
from torch import Tensor

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.approx.tridiag import BlockTridiagonal
from kfacore.plugin import PiRule
from kfacore.roles import Approximation, Inverse, LayerSamples
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments

TOLERANCE = 1e-10
NETS = {
    "narrowing": ((5, 4, 3, 2), True),
    "widening": ((2, 3, 4, 5), True),
    "code layer": ((4, 5, 2, 4, 3), True),
    "without bias": ((4, 3, 5, 2), False),
    "one unit": ((3, 1, 4, 1), True),
    "single layer": ((4, 3), True),
}
GAMMAS = (0.03, 0.5, 3.0)


@dataclass
class Case:
    layers: list[Block]
    samples: list[LayerSamples]
    factors: dense.Kronecker

    def inverse(self, approx: Approximation, gamma: float, *, pi: PiRule = "layer") -> Inverse:
        return damped(approx, self.layers, self.samples, gamma, pi=pi)


def damped(
    approx: Approximation, layers: list[Block], samples: list[LayerSamples], gamma: float, *, pi: PiRule = "layer"
) -> Inverse:
    moments = Moments(approx.moments, layers, samples[0].inputs)
    moments.update(samples, 0.95)
    return approx.factorise(moments).damped(torch.tensor(gamma, dtype=torch.float64), pi=pi)


def make(name: str, seed: int = 0) -> Case:
    sizes, bias = NETS[name]
    model = dense.net(sizes, bias=bias, seed=seed)
    x = dense.randn(30, sizes[0], seed=seed)
    samples = dense.case_samples(model, x, dense.randn(1, 30, sizes[-1], seed=seed + 1))
    return Case(dense.infos(model), samples, dense.Kronecker.of(samples))


def tridiag(tolerance: float = 0.0) -> BlockTridiagonal:
    return BlockTridiagonal(BlockTridiagonalConfig(tolerance=tolerance))


def offsets(layers: list[Block]) -> list[slice]:
    stops = [sum(layer.size for layer in layers[: i + 1]) for i in range(len(layers))]
    return [slice(a, b) for a, b in pairwise([0, *stops])]


def off_tridiagonal(matrix: Tensor, layers: list[Block]) -> Tensor:
    """The blocks |i - j| > 1, the others set to zero."""
    spans, result = offsets(layers), matrix.clone()
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            if abs(i - j) <= 1:
                result[rows, columns] = 0.0
    return result


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("pi", ["layer", "net", None])
def test_blockdiag_is_the_inverse_of_the_damped_diagonal_blocks(name: str, gamma: float, pi: PiRule) -> None:
    case = make(name)
    F = dense.block_diagonal(case.factors.damped(gamma, pi=pi))
    inverse = case.inverse(BlockDiagonal(), gamma, pi=pi)
    assert dense.relative(inverse.dense(), torch.linalg.inv(F)) < TOLERANCE
    assert dense.relative(inverse.dense(inverse=False), F) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("pi", ["layer", "net", None])
def test_tridiag_is_the_matrix_of_its_definition(name: str, gamma: float, pi: PiRule) -> None:
    case = make(name)
    reference = dense.tridiagonal_inverse(case.factors.damped(gamma, pi=pi))
    inverse = case.inverse(tridiag(), gamma, pi=pi)
    assert dense.relative(inverse.dense(), reference) < TOLERANCE
    assert dense.relative(inverse.dense(inverse=False), torch.linalg.inv(reference)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_the_definition_has_its_two_properties(name: str) -> None:
    """F-hat agrees with damped F-tilde on the tridiagonal blocks and its inverse is block-tridiagonal."""
    case = make(name)
    f_tilde = case.factors.damped(0.3).matrix()
    inverse = case.inverse(tridiag(), 0.3)
    F_hat, F_hat_inverse = inverse.dense(inverse=False), inverse.dense()
    scale = float(f_tilde.norm())
    difference = F_hat - f_tilde
    inside = difference - off_tridiagonal(difference, case.layers)
    assert float(inside.norm()) < TOLERANCE * scale
    assert float(off_tridiagonal(F_hat_inverse, case.layers).norm()) < TOLERANCE * float(F_hat_inverse.norm())
    if len(case.layers) > 2:  # F-hat itself is not block-tridiagonal, nor is it F-tilde
        assert float(off_tridiagonal(F_hat, case.layers).norm()) > 1e-6 * scale
        assert float(difference.norm()) > 1e-6 * scale


@pytest.mark.parametrize("name", NETS)
def test_reversed_edges_give_the_same_inverse(name: str) -> None:
    case = make(name)
    factors = case.factors.damped(0.3)
    found = case.inverse(tridiag(), 0.3).dense()
    assert dense.relative(found, dense.tridiagonal_inverse(factors, reverse=True)) < TOLERANCE
    # The implementation itself, on the chain read backwards: block i+1 given block i.
    backwards = damped(tridiag(), case.layers[::-1], case.samples[::-1], 0.3)
    v = dense.unvec(dense.randn(len(found)), case.layers)
    wanted = dense.unvec(found @ dense.vec(v), case.layers)
    for u, w in zip(backwards.solve(v[::-1])[::-1], wanted, strict=True):
        assert dense.relative(u, w) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_tolerance_one_is_block_diagonal_and_small_ones_are_close(name: str) -> None:
    case = make(name)
    exact = case.inverse(tridiag(), 0.1).dense()
    diagonal = case.inverse(BlockDiagonal(), 0.1).dense()
    none = case.inverse(tridiag(1.0), 0.1)
    assert dense.relative(none.dense(), diagonal) < 1e-14
    assert dense.relative(none.dense(inverse=False), case.inverse(BlockDiagonal(), 0.1).dense(inverse=False)) < 1e-14
    if len(case.layers) == 1:
        return
    whole = dense.relative(diagonal, exact)
    errors = [dense.relative(case.inverse(tridiag(t), 0.1).dense(), exact) for t in (1e-12, 1e-3, 1e-1)]
    assert errors[0] < 1e-5
    assert errors[1] < 0.1 * whole
    assert errors[0] <= errors[1] <= errors[2] <= 1.001 * whole


def test_a_truncated_inverse_is_still_the_inverse_of_its_multiply() -> None:
    case = make("code layer")
    inverse = case.inverse(tridiag(0.05), 0.1)
    product = inverse.dense() @ inverse.dense(inverse=False)
    eye = torch.eye(len(product), dtype=torch.float64)
    assert dense.relative(product, eye) < TOLERANCE
    values = torch.linalg.eigvalsh(inverse.dense())
    assert float(values.min()) > 0


def test_the_two_approximations_differ_where_they_should() -> None:
    case = make("code layer")
    a, b = case.inverse(BlockDiagonal(), 0.1).dense(), case.inverse(tridiag(), 0.1).dense()
    assert dense.relative(a, b) > 0.01
