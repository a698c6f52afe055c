r"""Canonical correlations of adjacent layers (method, section 3, "the same in canonical coordinates").

With roots of the damped factors, Ad_i = B_i B_i^T, the whitened cross moment of layers i and i+1 has a singular value
decomposition

    T = B_i^-1 Ax_i B_{i+1}^-T = U diag(r) W^T,        r in [0, 1): the canonical correlations.

Kept of the pair are thin factors, one column a correlation,

    K = B_i^-T U,     Z = B_{i+1}^-T W,     s = r^2,        so that  Ax_i Ad_{i+1}^-1 = Ad_i K diag(r) Z^T,

one of the two multiplied by diag(r), so that nothing is divided by a small r.

The roots are Cholesky factors. Of tempered factors they are eigenvectors, scaled; T is then made from the factors as
they were before, so that the correlations stay what they are, and K and Z from the tempered ones.

The vectors come from one symmetric eigenproblem on the narrower side (T^T T or T T^T), so a layer of 1000 units next
to one of 500 costs an eigenproblem of size 500.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfacore.curvature.linalg import EIGENPROBLEM, eigh_psd
from kfacore.curvature.spd import Root
from kfacore.roles.inverse import Notice

__all__ = ["Canonical", "canonical", "cost_of"]


_ROUNDING = 10.0
"""Squared correlations below this many units of rounding change nothing that the dtype can hold: never kept."""


@dataclass(frozen=True)
class Canonical:
    """One side (inputs or output gradients) of a pair of adjacent layers; k correlations kept.

    Attributes:
        K: (d_i, k), B_i^-T U, times diag(r) if ``scaled`` is ``"K"``.
        Z: (d_{i+1}, k), B_{i+1}^-T W, times diag(r) if ``scaled`` is ``"Z"``.
        s: (k,), squared correlations, in [0, 1].
        scaled: Which of the two is multiplied by diag(r).
    """

    K: Tensor
    Z: Tensor
    s: Tensor
    scaled: str

    def share(self, of: str) -> Tensor:
        """(k,), the square of what ``"K"`` or ``"Z"`` is multiplied by."""
        return self.s if self.scaled == of else torch.ones_like(self.s)


def cost_of(X: Tensor) -> float:
    """Operations of `canonical` for a cross moment."""
    return _products(X) + EIGENPROBLEM * float(min(X.shape)) ** 3


def _products(X: Tensor) -> float:
    (n, k), low = X.shape, min(X.shape)
    return float(n * k * (n + k) + low * (n * n + k * k + 2 * n * k))


def canonical(
    X: Tensor,  # (d_i, d_{i+1})
    here: Root,
    following: Root,
    tolerance: float,
    layer: str,
    factor: str,
) -> tuple[Canonical, list[Notice]]:
    """Find the canonical correlations of one side of a pair.

    Args:
        X: Cross moment.
        here: Root of the damped factor of layer i.
        following: Root of the damped factor of layer i+1.
        tolerance: Keep correlations with r^2 > tolerance; 0 keeps all, so that nothing is approximated.
        layer: Name of layer i, for notices.
        factor: Name of the cross moment, for notices.

    Raises:
        NumericalError: The eigenproblem failed even in double precision; names the layer.
    """
    T = following.whiten(here.whiten(X).T).T
    above = max(tolerance, _ROUNDING * torch.finfo(X.dtype).eps)
    if X.shape[1] <= X.shape[0]:
        s, W, notices = eigh_psd(T.T @ T, layer, factor, above)
        K, Z, scaled = here.dual(T @ W), following.dual(W), "K"
    else:
        s, U, notices = eigh_psd(T @ T.T, layer, factor, above)
        K, Z, scaled = here.dual(U), following.dual(T.T @ U), "Z"
    # In rows, as a checkpoint restores them: products of the two layouts differ in their last bits.
    return Canonical(K.contiguous(), Z.contiguous(), s.clamp(max=1.0), scaled), notices
