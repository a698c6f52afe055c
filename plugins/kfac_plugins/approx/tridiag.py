r"""The block-tridiagonal approximation of the inverse Fisher (Martens & Grosse 2015, section 4.3).

The blocks form a directed chain: given block i+1, block i has mean Psi_i and covariance Sigma_i, with

    Psi_i = PsiA_i (x) PsiG_i,                  PsiA_i = Ax_i Ad_{i+1}^-1,   PsiG_i = Gx_i Gd_{i+1}^-1
    Sigma_i = Ad_i (x) Gd_i - (PsiA_i Ax_i^T) (x) (PsiG_i Gx_i^T)
    F-hat^-1 = Xi^T Lambda Xi,                  Lambda = diag(Sigma_1^-1, ..., Sigma_{L-1}^-1, (Ad_L (x) Gd_L)^-1).

It is computed in canonical coordinates (method, section 3), `kfac_plugins.approx.canonical`: Sigma_i^-1 is the
block-diagonal inverse plus a correction whose rank is at most that of the narrower layer, and only as large as the
number of canonical correlations kept.

With an exponent below 1 (``power``) the damped factors are tempered first (`kfacore.kronecker.temper`); the cross
moments are carried over with them, so that the canonical correlations stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.canonical import Canonical, Side, canonical
from kfacore.kronecker import DampedFactors, damp, symmetric
from kfacore.layers import LayerInfo
from kfacore.moments import InputCross, InputFactor, Moments, OutputCross, OutputFactor
from kfacore.roles.approx import Approximation, Factorisation, Inverse, Notice

__all__ = ["BlockTridiagonal"]


class BlockTridiagonalInverse(Inverse):
    """Xi^T Lambda Xi for one gamma.

    Args:
        layers: The chain of layers.
        factors: Ad, Gd and their inverses.
        A: Canonical coordinates of adjacent inputs, one a pair of layers.
        G: Canonical coordinates of adjacent output gradients, one a pair.
        notices: What needed more than single precision.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        factors: DampedFactors,
        A: list[Canonical],
        G: list[Canonical],
        notices: tuple[Notice, ...] = (),
    ) -> None:
        self.layers = layers
        self.notices = notices
        self._factors, self._A, self._G = factors, A, G
        self._gains = [_gain(a, g) for a, g in zip(A, G, strict=True)]

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """U = Xi^T Lambda Xi V, one sweep each way."""
        last = len(blocks) - 1
        scaled = [self._conditional_solve(i, blocks[i] - self._mean(i, blocks[i + 1])) for i in range(last)]
        scaled.append(self._factors.solve(last, blocks[last]))
        return [scaled[0], *(scaled[i + 1] - self._mean_adjoint(i, scaled[i]) for i in range(last))]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat U = Xi^-1 Lambda^-1 Xi^-T U, by substitution along the chain."""
        last = len(blocks) - 1
        scaled = [blocks[0]]
        for i in range(last):
            scaled.append(blocks[i + 1] + self._mean_adjoint(i, scaled[i]))
        result = [self._factors.multiply(last, scaled[last])]
        for i in reversed(range(last)):
            result.insert(0, self._conditional_multiply(i, scaled[i]) + self._mean(i, result[0]))
        return result

    def state_dict(self) -> dict[str, Any]:
        """The damped factors and the canonical coordinates."""
        return {
            "factors": self._factors.state_dict(),
            "A": [c.state_dict() for c in self._A],
            "G": [c.state_dict() for c in self._G],
        }

    def _like(self) -> Tensor:
        return self._factors.A[0].inverse

    def _mean(self, i: int, V: Tensor) -> Tensor:
        """PsiG_i V_{i+1} PsiA_i^T."""
        return _between(self._G[i].psi, V, _transposed(self._A[i].psi))

    def _mean_adjoint(self, i: int, V: Tensor) -> Tensor:
        """PsiG_i^T V_i PsiA_i."""
        return _between(_transposed(self._G[i].psi), V, self._A[i].psi)

    def _conditional_solve(self, i: int, V: Tensor) -> Tensor:
        """Sigma_i^-1 V = Gd^-1 V Ad^-1 + K_G [(K_G^T V K_A) / (1 - s_G s_A^T)] K_A^T, K scaled by r."""
        K_A, K_G = self._A[i].K, self._G[i].K
        result = self._factors.solve(i, V)
        if self._gains[i].numel() == 0:
            return result
        core = _chain([K_G.T, V, K_A]).mul_(self._gains[i])
        return result.add_(_chain([K_G, core, K_A.T]))

    def _conditional_multiply(self, i: int, V: Tensor) -> Tensor:
        """Sigma_i V = Y - (Gd K_G) (K_G^T Y K_A) (Ad K_A)^T with Y = Gd V Ad."""
        K_A, K_G = self._A[i].K, self._G[i].K
        Y = self._factors.multiply(i, V)
        if self._gains[i].numel() == 0:
            return Y
        core = _chain([K_G.T, Y, K_A])
        left, right = self._factors.G[i].times(K_G), self._factors.A[i].times(K_A)
        return Y - _chain([left, core, right.T])


def _chain(matrices: list[Tensor]) -> Tensor:
    """The product of all, in the cheapest order."""
    result: Tensor = torch.linalg.multi_dot(matrices)
    return result


def _gain(A: Canonical, G: Canonical) -> Tensor:
    """1 / (1 - s_G s_A^T), entry by entry; a denominator of exactly 0 counts as 1, as in the authors' program."""
    denominator = 1.0 - torch.outer(G.s, A.s)
    return torch.where(denominator == 0, torch.ones_like(denominator), denominator).reciprocal_()


def _transposed(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(factor.T for factor in reversed(factors))


def _between(left: tuple[Tensor, ...], V: Tensor, right: tuple[Tensor, ...]) -> Tensor:
    """Left V right; zero if no correlation was kept."""
    if any(0 in factor.shape for factor in (*left, *right)):
        return V.new_zeros(left[0].shape[0], right[-1].shape[1])
    return _chain([*left, V, *right])


class BlockTridiagonalFactorisation(Factorisation):
    """Symmetric copies of A and G and copies of the cross moments, shared by all candidates of gamma."""

    def __init__(self, layers: Sequence[LayerInfo], moments: Moments, config: BlockTridiagonalConfig) -> None:
        self._layers = layers
        self._A, self._G = symmetric(moments[InputFactor]), symmetric(moments[OutputFactor])
        self._Ax, self._Gx = moments.snapshot(InputCross), moments.snapshot(OutputCross)
        self._config = config

    def damped(self, gamma: Tensor, *, pi: bool = True) -> BlockTridiagonalInverse:
        """Damp, temper, invert, and find the canonical correlations of adjacent layers."""
        config = self._config
        damped = damp(self._layers, self._A, self._G, gamma, pi=pi, power=config.power)
        factors, notices = damped.factors, damped.notices
        found: dict[str, list[Canonical]] = {"A": [], "G": []}
        for name, cross, inverted in (("A", self._Ax, factors.A), ("G", self._Gx, factors.G)):
            if roots := damped.roots[name]:
                cross = [R @ X @ S for R, X, S in zip(roots[:-1], cross, roots[1:], strict=True)]
            sides = [Side(L, factor.inverse) for L, factor in zip(damped.lower[name], inverted, strict=True)]
            for layer, X, here, following in zip(self._layers[:-1], cross, sides[:-1], sides[1:], strict=True):
                pair, more = canonical(X, here, following, config.tolerance, layer.name, f"{name}x")
                found[name].append(pair)
                notices += tuple(more)
        return BlockTridiagonalInverse(self._layers, factors, found["A"], found["G"], notices)


class BlockTridiagonal(Approximation):
    """Block-tridiagonal Kronecker-factored inverse Fisher of a chain of layers."""

    Config = BlockTridiagonalConfig
    config: BlockTridiagonalConfig
    moments = (InputFactor, OutputFactor, InputCross, OutputCross)
    structure = "chain"

    def factorise(self, moments: Moments) -> BlockTridiagonalFactorisation:
        """Copy the moments."""
        return BlockTridiagonalFactorisation(moments.layers, moments, self.config)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[LayerInfo]) -> BlockTridiagonalInverse:
        """From the damped factors and the canonical coordinates."""
        A, G = ([Canonical.from_state(pair) for pair in state[side]] for side in "AG")
        return BlockTridiagonalInverse(layers, DampedFactors.from_state(state["factors"]), A, G)
