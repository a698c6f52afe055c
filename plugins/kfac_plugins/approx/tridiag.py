r"""The block-tridiagonal approximation of the inverse Fisher (Martens & Grosse 2015, section 4.3).

The blocks form a directed chain: given block i+1, block i has mean Psi_i and covariance Sigma_i, with

    Psi_i = PsiA_i (x) PsiG_i,                  PsiA_i = Ax_i Ad_{i+1}^-1,   PsiG_i = Gx_i Gd_{i+1}^-1
    Sigma_i = Ad_i (x) Gd_i - (PsiA_i Ax_i^T) (x) (PsiG_i Gx_i^T)
    F-hat^-1 = Xi^T Lambda Xi,                  Lambda = diag(Sigma_1^-1, ..., Sigma_{L-1}^-1, (Ad_L (x) Gd_L)^-1).

In canonical coordinates (`kfac_plugins.approx.canonical`) this is the block-diagonal inverse and, for each pair of
adjacent layers, a symmetric correction on the directions that are correlated. There a pair is a lot of pairs of
numbers with the correlation rho = r_G r_A, and 1, rho; rho, 1 has the inverse

    1 + g rho^2,  -g rho;  -g rho,  1 + g rho^2        with g = 1 / (1 - rho^2).

With n = K_G^T V_i K_A and m = Z_G^T V_{i+1} Z_A, and rho entry by entry, pair i adds

    K_G [g (rho^2 n - rho m)] K_A^T  to U_i,           Z_G [g (rho^2 m - rho n)] Z_A^T  to U_{i+1}.

The corrections do not depend on each other, and are only as large as the number of correlations kept.

With an exponent below 1 (``power``) the damped factors are tempered first (`kfacore.curvature.tempering`); the cross
moments are carried over with them, so that the canonical correlations stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.canonical import Canonical, canonical, cost_of
from kfacore.curvature.kronecker import DampedFactors, damp, ready
from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.parallel.cores import on_each_core
from kfacore.plugin import PiRule
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments

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
        layers: Sequence[Block],
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
        """The block-diagonal solution and the corrections of all pairs."""
        result = [torch.empty_like(V) for V in blocks]
        self.solve_into(blocks, result)
        return result

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """The last product of each part lands where it is wanted."""
        for i, (V, target) in enumerate(zip(blocks, out, strict=True)):
            self._factors.solve(i, V, target)
        for i, (A, G, gain) in enumerate(zip(self._A, self._G, self._gains, strict=True)):
            if gain.both.numel() == 0:
                continue
            n, m = _chain([G.K.T, blocks[i], A.K]), _chain([G.Z.T, blocks[i + 1], A.Z])
            _add(out[i], G.K, (gain.here * n).addcmul_(gain.both, m, value=-1), A.K)
            _add(out[i + 1], G.Z, (gain.following * m).addcmul_(gain.both, n, value=-1), A.Z)

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
            "A": [dict(vars(pair)) for pair in self._A],
            "G": [dict(vars(pair)) for pair in self._G],
        }

    def _like(self) -> Tensor:
        return self._factors.A[0].inverse

    def _colored(self, i: int) -> tuple[Tensor, Tensor]:
        """Gd_i K_G and Ad_i K_A."""
        return self._factors.G[i].times(self._G[i].K), self._factors.A[i].times(self._A[i].K)

    def _mean(self, i: int, V: Tensor) -> Tensor:
        """PsiG_i V_{i+1} PsiA_i^T."""
        left, right = self._colored(i)
        return _chain([left, self._G[i].Z.T, V, self._A[i].Z, right.T])

    def _mean_adjoint(self, i: int, V: Tensor) -> Tensor:
        """PsiG_i^T V_i PsiA_i."""
        left, right = self._colored(i)
        return _chain([self._G[i].Z, left.T, V, right, self._A[i].Z.T])

    def _conditional_multiply(self, i: int, V: Tensor) -> Tensor:
        """Sigma_i V = Y - (Gd K_G) [s_G s_A^T (K_G^T Y K_A)] (Ad K_A)^T with Y = Gd V Ad, for K that are not scaled."""
        A, G = self._A[i], self._G[i]
        Y = self._factors.multiply(i, V)
        left, right = self._colored(i)
        core = _chain([G.K.T, Y, A.K]) * torch.outer(G.share("Z"), A.share("Z"))
        return Y - _chain([left, core, right.T])


class Gain(NamedTuple):
    """What the corrections of a pair multiply n and m by, entry by entry, (k_G, k_A).

    Attributes:
        both: g rho over what K and Z are scaled by.
        here: g rho^2 over the square of what K is scaled by.
        following: g rho^2 over the square of what Z is scaled by.
    """

    both: Tensor
    here: Tensor
    following: Tensor


def _gain(A: Canonical, G: Canonical) -> Gain:
    """With g = 1 / (1 - s_G s_A^T); a denominator of exactly 0 counts as 1, as in the authors' program."""
    denominator = 1.0 - torch.outer(G.s, A.s)
    g = torch.where(denominator == 0, torch.ones_like(denominator), denominator).reciprocal_()
    here, following = (torch.outer(G.share(of), A.share(of)).mul_(g) for of in ("Z", "K"))
    return Gain(g, here, following)


def _chain(matrices: list[Tensor]) -> Tensor:
    """The product of all, in the cheapest order."""
    result: Tensor = torch.linalg.multi_dot(matrices)
    return result


def _add(target: Tensor, left: Tensor, core: Tensor, right: Tensor) -> None:
    """target += left core right^T, in the cheaper order."""
    if left.shape[0] * core.shape[1] * (core.shape[0] + right.shape[0]) <= (
        right.shape[0] * core.shape[0] * (core.shape[1] + left.shape[0])
    ):
        target.addmm_(left @ core, right.T)
    else:
        target.addmm_(left, core @ right.T)


class BlockTridiagonalFactorisation(Factorisation):
    """The moments, shared by all candidates of gamma."""

    def __init__(self, layers: Sequence[Block], moments: Moments, config: BlockTridiagonalConfig) -> None:
        self._layers = layers
        self._A, self._G = (ready(moments[kind], config.power) for kind in (InputFactor, OutputFactor))
        self._Ax, self._Gx = moments[InputCross], moments[OutputCross]
        self._config = config

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> BlockTridiagonalInverse:
        """Damp, temper, invert, and find the canonical correlations of adjacent layers."""
        factors, roots, notices = damp(self._layers, self._A, self._G, gamma, pi=pi, power=self._config.power)
        pairs = [
            (X, here, following, self._config.tolerance, layer.name, f"{side}x")
            for side, cross in (("A", self._Ax), ("G", self._Gx))
            for layer, X, (here, following) in zip(self._layers[:-1], cross, pairwise(roots.pop(side)), strict=True)
        ]
        costs = [cost_of(X) for X, *_ in pairs]
        found = on_each_core(lambda pair: canonical(*pair), pairs, costs, gamma.device)
        notices += tuple(notice for _, more in found for notice in more)
        both, edges = [pair for pair, _ in found], len(self._layers) - 1
        return BlockTridiagonalInverse(self._layers, factors, both[:edges], both[edges:], notices)


class BlockTridiagonal(Approximation):
    """Block-tridiagonal Kronecker-factored inverse Fisher of a chain of layers."""

    Config = BlockTridiagonalConfig
    config: BlockTridiagonalConfig
    moments = (InputFactor, OutputFactor, InputCross, OutputCross)
    structure = "chain"

    def factorise(self, moments: Moments) -> BlockTridiagonalFactorisation:
        """Symmetrise A and G where the inverse will keep them."""
        return BlockTridiagonalFactorisation(moments.layers, moments, self.config)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> BlockTridiagonalInverse:
        """From the damped factors and the canonical coordinates."""
        A, G = ([Canonical(**pair) for pair in state[side]] for side in "AG")
        return BlockTridiagonalInverse(layers, DampedFactors.from_state(state["factors"]), A, G)
