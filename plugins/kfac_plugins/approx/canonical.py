r"""Canonical correlations of adjacent layers (method, section 3, "the same in canonical coordinates").

With Ad_i = L_i L_i^T, the whitened cross moment of layers i and i+1 has a singular value decomposition

    T = L_i^-1 Ax_i L_{i+1}^-T = U diag(r) W^T,        r in [0, 1): the canonical correlations.

Everything the block-tridiagonal inverse needs of the pair is thin, one column a correlation, s = r^2:

    PsiA_i = Ax_i Ad_{i+1}^-1 = P Q^T,      K = L_i^-T U diag(r),      PsiA_i Ax_i^T = Ad_i K K^T Ad_i.

The vectors come from one symmetric eigenproblem on the narrower side (T^T T or T T^T), so a layer of 1000 units next
to one of 500 costs an eigenproblem of size 500. No formula divides by r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.linalg import eigh_psd
from kfacore.roles.approx import Notice

__all__ = ["Canonical", "canonical"]


@dataclass(frozen=True)
class Canonical:
    """One side (inputs or output gradients) of a pair of adjacent layers; k correlations kept.

    Attributes:
        P: (d_i, k); with Q, Psi = P Q^T.
        Q: (d_{i+1}, k).
        K: (d_i, k), L_i^-T U diag(r).
        s: (k,), squared correlations, in [0, 1].
    """

    P: Tensor
    Q: Tensor
    K: Tensor
    s: Tensor

    def state_dict(self) -> dict[str, Any]:
        """Every tensor."""
        return {"P": self.P, "Q": self.Q, "K": self.K, "s": self.s}


def canonical(
    X: Tensor,  # (d_i, d_{i+1})
    L: Tensor,  # (d_i, d_i) lower
    L_next: Tensor,  # (d_{i+1}, d_{i+1}) lower
    tolerance: float,
    layer: str,
    factor: str,
) -> tuple[Canonical, list[Notice]]:
    """Find the canonical correlations of one side of a pair.

    Args:
        X: Cross moment.
        L: Cholesky factor of the damped factor of layer i.
        L_next: The same of layer i+1.
        tolerance: Keep correlations with r^2 > tolerance; 0 keeps all, so that nothing is approximated.
        layer: Name of layer i, for notices.
        factor: Name of the cross moment, for notices.

    Raises:
        NumericalError: The eigenproblem failed even in double precision; names the layer.
    """
    half = torch.linalg.solve_triangular(L, X, upper=False)  # L^-1 X
    T = torch.linalg.solve_triangular(L_next, half.T, upper=False).T  # L^-1 X L_next^-T
    narrow_next = X.shape[1] <= X.shape[0]
    s, vectors, notices = eigh_psd(T.T @ T if narrow_next else T @ T.T, layer, factor)
    s = s.clamp(0.0, 1.0)
    if tolerance > 0:
        kept = int((s > tolerance).sum())  # ascending order: the last ones
        s, vectors = s[len(s) - kept :], vectors[:, vectors.shape[1] - kept :]
    if narrow_next:  # vectors = W
        Q = torch.linalg.solve_triangular(L_next.T, vectors, upper=True)
        P = X @ Q
        K = torch.linalg.solve_triangular(L.T, T @ vectors, upper=True)
    else:  # vectors = U
        Q = torch.linalg.solve_triangular(L_next.T, T.T @ vectors, upper=True)
        P = L @ vectors
        K = torch.linalg.solve_triangular(L.T, vectors, upper=True) * s.sqrt()
    return Canonical(P, Q, K, s), notices
