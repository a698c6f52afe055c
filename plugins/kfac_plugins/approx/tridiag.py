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

Nothing of this needs a chain. The pairs (i, j) that are coupled may be any forest, where a block has as many neighbours
as it likes: Gaussian variables whose dependencies form a tree have the precision matrix of independent ones plus, for
every edge, what its two ends' joint precision has beyond theirs (Lauritzen 1996, section 5.3). Which pairs there are is
decided by whoever knows the network (`Moments.pairs`); a block without any is block-diagonal.

With an exponent below 1 (``power``) the damped factors are tempered first (`kfacore.curvature.tempering`); the cross
moments are carried over with them, so that the canonical correlations stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_plugins.approx import BlockTridiagonalConfig
from kfac_plugins.approx.canonical import Canonical, canonical, cost_of
from kfacore.curvature.forest import leaves_first
from kfacore.curvature.kronecker import DampedFactors, damp, ready
from kfacore.curvature.linalg import log_pi_of
from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.parallel.cores import share
from kfacore.parallel.division import Wire
from kfacore.plugin import PiRule
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments

__all__ = ["BlockTridiagonal"]


class BlockTridiagonalInverse(Inverse):
    """Xi^T Lambda Xi for one gamma.

    Args:
        layers: The blocks.
        factors: Ad, Gd and their inverses.
        pairs: The blocks (i, j) that are coupled, a forest.
        A: Canonical coordinates of the inputs of each pair.
        G: Canonical coordinates of the output gradients of each pair.
        notices: What needed more than single precision.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        factors: DampedFactors,
        pairs: Sequence[tuple[int, int]],
        A: list[Canonical],
        G: list[Canonical],
        notices: tuple[Notice, ...] = (),
    ) -> None:
        self.layers = layers
        self.notices = notices
        self._factors, self._pairs, self._A, self._G = factors, list(pairs), A, G
        self._order = leaves_first(len(layers), self._pairs)
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
        for (i, j), A, G, gain in zip(self._pairs, self._A, self._G, self._gains, strict=True):
            if gain.both.numel() == 0:
                continue
            n, m = _chain([G.K.T, blocks[i], A.K]), _chain([G.Z.T, blocks[j], A.Z])
            _add(out[i], G.K, (gain.here * n).addcmul_(gain.both, m, value=-1), A.K)
            _add(out[j], G.Z, (gain.following * m).addcmul_(gain.both, n, value=-1), A.Z)

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat U = Xi^-1 Lambda^-1 Xi^-T U, by elimination from the leaves to the roots and back."""
        scaled = list(blocks)
        for step in self._order:
            if step.pair is not None:
                parent = step.parent
                scaled[parent] = scaled[parent] + self._mean_adjoint(step.pair, scaled[step.node], down=step.down)
        result = list(blocks)
        for step in reversed(self._order):
            V = scaled[step.node]
            if step.pair is None:
                result[step.node] = self._factors.multiply(step.node, V)
            else:
                own = self._conditional_multiply(step.pair, step.node, V, down=step.down)
                result[step.node] = own + self._mean(step.pair, result[step.parent], down=step.down)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The damped factors and the canonical coordinates."""
        return {
            "factors": self._factors.state_dict(),
            "pairs": [list(pair) for pair in self._pairs],
            "A": [dict(vars(pair)) for pair in self._A],
            "G": [dict(vars(pair)) for pair in self._G],
        }

    def _like(self) -> Tensor:
        return self._factors.A[0].inverse

    def _ends(self, pair: int, *, down: bool) -> tuple[_End, _End]:
        """The two ends of a pair, that of the child first: the pair's first block if ``down``, else its second."""
        (i, j), A, G = self._pairs[pair], self._A[pair], self._G[pair]
        first = _End(G.K, A.K, torch.outer(G.share("Z"), A.share("Z")))
        second = _End(G.Z, A.Z, torch.outer(G.share("K"), A.share("K")))
        child, parent = (first, second) if down else (second, first)
        node = i if down else j
        left, right = self._factors.G[node].times(child.G), self._factors.A[node].times(child.A)
        return _End(left, right, child.share), parent

    def _mean(self, pair: int, V: Tensor, *, down: bool) -> Tensor:
        """PsiG V PsiA^T: the child's mean given the parent's V."""
        child, parent = self._ends(pair, down=down)
        return _chain([child.G, parent.G.T, V, parent.A, child.A.T])

    def _mean_adjoint(self, pair: int, V: Tensor, *, down: bool) -> Tensor:
        """PsiG^T V PsiA, for the child's V."""
        child, parent = self._ends(pair, down=down)
        return _chain([parent.G, child.G.T, V, child.A, parent.A.T])

    def _conditional_multiply(self, pair: int, node: int, V: Tensor, *, down: bool) -> Tensor:
        """Sigma V = Y - (Gd K_G) [s_G s_A^T (K_G^T Y K_A)] (Ad K_A)^T with Y = Gd V Ad, for K that are not scaled."""
        A, G = self._A[pair], self._G[pair]
        Y = self._factors.multiply(node, V)
        child, _ = self._ends(pair, down=down)
        left, right = (G.K, A.K) if down else (G.Z, A.Z)
        return Y - _chain([child.G, _chain([left.T, Y, right]) * child.share, child.A.T])


class _End(NamedTuple):
    """One end of a pair.

    Attributes:
        G: K_G or Z_G, or Gd times it.
        A: K_A or Z_A, or Ad times it.
        share: s_G s_A^T over what the two are scaled by already.
    """

    G: Tensor
    A: Tensor
    share: Tensor


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
        self._pairs = list(moments.pairs)
        self._Ax, self._Gx = moments[InputCross], moments[OutputCross]
        self._config = config

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Of all blocks."""
        return log_pi_of(self._A, self._G)

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> BlockTridiagonalInverse:
        """Damp, temper, invert, and find the canonical correlations of the pairs.

        Raises:
            NumericalError: A factorisation failed; names the layer.
            ConfigError: The pairs are no forest.
        """
        factors, roots, notices = damp(self._layers, self._A, self._G, gamma, pi=pi, power=self._config.power)
        tolerance = self._config.tolerance
        jobs, costs = [], []
        for side, cross in (("A", self._Ax), ("G", self._Gx)):
            own = roots.pop(side)
            for (i, j), X in zip(self._pairs, cross, strict=True):
                jobs.append(partial(canonical, X, own[i], own[j], tolerance, self._layers[i].name, f"{side}x"))
                costs.append(cost_of(X))
        found = share(jobs, costs, gamma.device, Wire(_packed, _unpacked))
        notices += tuple(notice for _, more in found for notice in more)
        both, edges = [pair for pair, _ in found], len(self._pairs)
        return BlockTridiagonalInverse(self._layers, factors, self._pairs, both[:edges], both[edges:], notices)


def _packed(found: tuple[Canonical, list[Notice]]) -> tuple[list[Tensor], Any]:
    """One side of a pair on its way to other processes."""
    pair, notices = found
    return [pair.K, pair.Z, pair.s], (pair.scaled, notices)


def _unpacked(_: int, tensors: list[Tensor], more: Any) -> tuple[Canonical, list[Notice]]:
    (K, Z, s), (scaled, notices) = tensors, more
    return Canonical(K, Z, s, scaled), notices


class BlockTridiagonal(Approximation):
    """Block-tridiagonal Kronecker-factored inverse Fisher of a chain of layers, or of any forest of pairs."""

    Config = BlockTridiagonalConfig
    config: BlockTridiagonalConfig
    moments = (InputFactor, OutputFactor, InputCross, OutputCross)
    damps_each = True
    divides = True
    structure = "chain"

    def factorise(self, moments: Moments) -> BlockTridiagonalFactorisation:
        """Symmetrise A and G where the inverse will keep them."""
        return BlockTridiagonalFactorisation(moments.layers, moments, self.config)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> BlockTridiagonalInverse:
        """From the damped factors and the canonical coordinates."""
        A, G = ([Canonical(**pair) for pair in state[side]] for side in "AG")
        pairs = [(int(i), int(j)) for i, j in state["pairs"]]
        return BlockTridiagonalInverse(layers, DampedFactors.from_state(state["factors"]), pairs, A, G)
