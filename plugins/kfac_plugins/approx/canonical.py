r"""Canonical correlations of adjacent layers (method, section 3, "the same in canonical coordinates").

With Ad_i = L_i L_i^T, the whitened cross moment of layers i and i+1 has a singular value decomposition

    T = L_i^-1 Ax_i L_{i+1}^-T = U diag(r) W^T,        r in [0, 1): the canonical correlations.

The block-tridiagonal inverse needs of the pair, with s = r^2 and one column a correlation,

    PsiA_i = Ax_i Ad_{i+1}^-1,      K = L_i^-T U diag(r),      PsiA_i Ax_i^T = Ad_i K K^T Ad_i.

The vectors come from one symmetric eigenproblem on the narrower side (T^T T or T T^T), so a layer of 1000 units next
to one of 500 costs an eigenproblem of size 500. T itself is never formed: with the inverses of the damped factors at
hand, all that is large is plain matrix products. No formula divides by r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.linalg import eigh_psd
from kfacore.roles.approx import Notice

__all__ = ["Canonical", "Side", "canonical"]


_ROUNDING = 10.0
"""Squared correlations below this many units of rounding change nothing that the dtype can hold: never kept."""


@dataclass(frozen=True)
class Canonical:
    """One side (inputs or output gradients) of a pair of adjacent layers; k correlations kept.

    Attributes:
        psi: Psi, (d_i, d_{i+1}), as one matrix or as two thin ones to be multiplied, whichever is cheaper to apply.
        K: (d_i, k), L_i^-T U diag(r).
        s: (k,), squared correlations, in [0, 1].
    """

    psi: tuple[Tensor, ...]
    K: Tensor
    s: Tensor

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {"psi": list(self.psi), "K": self.K, "s": self.s}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Canonical:
        """Restore from `state_dict`."""
        return cls(tuple(state["psi"]), state["K"], state["s"])


@dataclass(frozen=True)
class Side:
    """A damped factor: its Cholesky factor L and its inverse, (d, d)."""

    L: Tensor
    inverse: Tensor


def canonical(
    X: Tensor,  # (d_i, d_{i+1})
    here: Side,
    following: Side,
    tolerance: float,
    layer: str,
    factor: str,
) -> tuple[Canonical, list[Notice]]:
    """Find the canonical correlations of one side of a pair.

    Args:
        X: Cross moment.
        here: Damped factor of layer i.
        following: Damped factor of layer i+1.
        tolerance: Keep correlations with r^2 > tolerance; 0 keeps all, so that nothing is approximated.
        layer: Name of layer i, for notices.
        factor: Name of the cross moment, for notices.

    Raises:
        NumericalError: The eigenproblem failed even in double precision; names the layer.
    """
    solve = torch.linalg.solve_triangular
    wide_here = X.shape[1] <= X.shape[0]
    if wide_here:  # T^T T = L_{i+1}^-1 (X^T Y) L_{i+1}^-T with Y = Ad_i^-1 X
        product, L = here.inverse @ X, following.L
        gram = X.T @ product
    else:  # T T^T = L_i^-1 (Psi X^T) L_i^-T
        product, L = X @ following.inverse, here.L
        gram = product @ X.T
    gram = solve(L, solve(L, gram, upper=False).T, upper=False)
    above = max(tolerance, _ROUNDING * torch.finfo(X.dtype).eps)
    s, vectors, notices = eigh_psd(gram, layer, factor, above)
    s = s.clamp(max=1.0)
    unwhitened = solve(L.T, vectors, upper=True)  # L_{i+1}^-T W or L_i^-T U
    K = product @ unwhitened if wide_here else unwhitened * s.sqrt()
    if tolerance == 0:
        return Canonical((X @ following.inverse if wide_here else product,), K, s), notices
    thin = (X @ unwhitened, unwhitened.T) if wide_here else (L @ vectors, (product.T @ unwhitened).T)
    cheaper = len(s) * sum(X.shape) < X.shape[0] * X.shape[1]
    return Canonical(thin if cheaper else (thin[0] @ thin[1],), K, s), notices
