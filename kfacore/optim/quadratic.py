r"""The exact quadratic model of the objective on a few directions (method, section 4; paper, sections 6.4 and 7).

With directions v_1..v_k, F the exact Fisher on some cases and eta the weight decay,

    M_ij = mean over cases of (J v_i)^T F_R (J v_j) + (lambda + eta) v_i^T v_j,      b_i = grad^T v_i,
    model(x) = 1/2 x^T M x + b^T x.

M and b are float64 whatever the parameters are; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfacore.roles.likelihood import Likelihood

__all__ = ["fisher_gram", "gram", "minimise_one", "minimise_two", "model_value", "on_planes", "symmetric_gram"]

_PARALLEL = 1e-13
"""Below this 1 - cos^2 of two directions (in the metric M) they count as parallel."""


def fisher_gram(
    likelihood: Likelihood,
    z: Tensor,  # (n, o)
    Jv: Tensor,  # (k, n, o)
) -> Tensor:  # (k, k) float64
    """Mean over cases of (J v_i)^T F_R (J v_j), accumulated in double precision."""
    return gram(Jv, likelihood.fisher_product(z, Jv)) / z.shape[0]


def gram(
    Jv: Tensor,  # (k, n, o)
    FJv: Tensor,  # (k, n, o)
) -> Tensor:  # (k, k) float64
    """Sum over rows of (J v_i)^T F_R J v_j, accumulated in double precision."""
    return symmetric_gram(lambda i, j: (Jv[i] * FJv[j]).sum(dtype=torch.float64), Jv.shape[0])


def symmetric_gram(entry: Callable[[int, int], Tensor], k: int) -> Tensor:  # (k, k) float64
    """The symmetric matrix of k (k + 1) / 2 inner products, each formed once."""
    upper = {(i, j): entry(i, j).double() for j in range(k) for i in range(j + 1)}
    return torch.stack([upper[min(i, j), max(i, j)] for i in range(k) for j in range(k)]).view(k, k)


def on_planes(
    M: Tensor,  # (c + 1, c + 1)
    b: Tensor,  # (c + 1,)
) -> tuple[Tensor, Tensor]:  # (c, 2, 2), (c, 2)
    """The model on the planes (v_i, v_last) of c candidates and one common direction, the last."""
    c = M.shape[0] - 1
    first, last = M.diagonal()[:c], M[c, c].expand(c)
    cross = M[:c, c]
    planes = torch.stack([torch.stack([first, cross], 1), torch.stack([cross, last], 1)], 1)
    return planes, torch.stack([b[:c], b[c].expand(c)], 1)


def minimise_one(
    m: Tensor,  # (c,)
    b: Tensor,  # (c,)
) -> Tensor:  # (c,)
    """Argmin of 1/2 m x^2 + b x; 0 where there is no curvature (a zero direction)."""
    return torch.where(m > 0, -b / torch.where(m > 0, m, torch.ones_like(m)), torch.zeros_like(b))


def minimise_two(
    M: Tensor,  # (c, 2, 2)
    b: Tensor,  # (c, 2)
) -> Tensor:  # (c, 2)
    """Argmin of the model on planes, -M^+ b.

    Where the two directions are parallel in the metric M, or one is zero, the first one alone (or the other) reaches
    the same minimum.
    """
    m11, m22, m12 = M[:, 0, 0], M[:, 1, 1], M[:, 0, 1]
    determinant = m11 * m22 - m12 * m12
    regular = determinant > _PARALLEL * m11 * m22
    safe = torch.where(regular, determinant, torch.ones_like(determinant))
    alpha = (m12 * b[:, 1] - m22 * b[:, 0]) / safe
    mu = (m12 * b[:, 0] - m11 * b[:, 1]) / safe
    alone = minimise_one(m11, b[:, 0])
    other = torch.where(m11 > 0, torch.zeros_like(alone), minimise_one(m22, b[:, 1]))
    return torch.stack([torch.where(regular, alpha, alone), torch.where(regular, mu, other)], dim=1)


def model_value(
    M: Tensor,  # (c, 2, 2)
    b: Tensor,  # (c, 2)
    x: Tensor,  # (c, 2)
) -> Tensor:  # (c,)
    """Predicted change of the objective, 1/2 x^T M x + b^T x; 1/2 b^T x at the minimum."""
    return 0.5 * torch.einsum("ci,cij,cj->c", x, M, x) + (b * x).sum(1)
