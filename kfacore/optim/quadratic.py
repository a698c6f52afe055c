r"""The exact quadratic model of the objective on a few directions (method, section 4; paper, sections 6.4 and 7).

With directions v_1..v_k, F the exact Fisher on some cases and eta the weight decay,

    M_ij = mean over cases of (J v_i)^T F_R (J v_j) + (lambda + eta) v_i^T v_j,      b_i = grad^T v_i,
    model(x) = 1/2 x^T M x + b^T x.

M and b are float64 whatever the parameters are; nothing here waits for the device. Where numbers lie on the host they
are worked on as Python's own, which are the same float64: as tensors, two unknowns are some fifty operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kfacore import host
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
    if c == 1:
        return M.unsqueeze(0), b.unsqueeze(0)
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
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:  # (c, 2)
    """Argmin of the model on planes, -M^+ b, with the second coordinate within bounds.

    Where the two directions are parallel in the metric M, or one is zero, the first one alone (or the other) reaches
    the same minimum.
    """
    if _on_host(M, b):
        planes = zip(M.flatten(1).tolist(), b.tolist(), strict=True)
        return M.new_tensor([_minimum(m11, m12, m22, b1, b2, bounds) for (m11, m12, _, m22), (b1, b2) in planes])
    m11, m22, m12 = M[:, 0, 0], M[:, 1, 1], M[:, 0, 1]
    determinant = m11 * m22 - m12 * m12
    regular = determinant > _PARALLEL * m11 * m22
    safe = torch.where(regular, determinant, torch.ones_like(determinant))
    alpha = (m12 * b[:, 1] - m22 * b[:, 0]) / safe
    mu = (m12 * b[:, 0] - m11 * b[:, 1]) / safe
    alone = minimise_one(m11, b[:, 0])
    other = torch.where(m11 > 0, torch.zeros_like(alone), minimise_one(m22, b[:, 1]))
    x, y = torch.where(regular, alpha, alone), torch.where(regular, mu, other)
    within = y.clamp(*bounds)
    x = torch.where(within == y, x, minimise_one(m11, b[:, 0] + m12 * within))
    return torch.stack([x, within], dim=1)


def _minimum(
    m11: float, m12: float, m22: float, b1: float, b2: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """The same for one plane on the host."""
    determinant = m11 * m22 - m12 * m12
    if determinant > _PARALLEL * m11 * m22:
        x, y = (m12 * b2 - m22 * b1) / determinant, (m12 * b1 - m11 * b2) / determinant
    elif m11 > 0:
        x, y = -b1 / m11, 0.0
    else:
        x, y = 0.0, -b2 / m22 if m22 > 0 else 0.0
    lowest, highest = bounds
    if lowest <= y <= highest or y != y:
        return x, y
    y = min(max(y, lowest), highest)
    return -(b1 + m12 * y) / m11 if m11 > 0 else 0.0, y


def model_value(
    M: Tensor,  # (c, 2, 2)
    b: Tensor,  # (c, 2)
    x: Tensor,  # (c, 2)
) -> Tensor:  # (c,)
    """Predicted change of the objective, 1/2 x^T M x + b^T x; 1/2 b^T x at the minimum."""
    if _on_host(M, b, x):
        rows = zip(M.flatten(1).tolist(), b.tolist(), x.tolist(), strict=True)
        return M.new_tensor([_value(*m, *v, *at) for m, v, at in rows])
    return 0.5 * torch.einsum("ci,cij,cj->c", x, M, x) + (b * x).sum(1)


def _value(m11: float, m12: float, m21: float, m22: float, b1: float, b2: float, x: float, y: float) -> float:
    """The same for one plane on the host."""
    return 0.5 * (x * (m11 * x + m12 * y) + y * (m21 * x + m22 * y)) + (b1 * x + b2 * y)


def _on_host(*tensors: Tensor) -> bool:
    """Whether reading them costs no wait, and nobody differentiates by them."""
    return all(host.is_free(t) and t.dtype == torch.float64 and not t.requires_grad for t in tensors)
