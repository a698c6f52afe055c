r"""Inverse square roots of damped factors in matrix products alone, where those are what a device is fast at.

A GPU takes eigenproblems apart into thousands of small kernels; products it does at its peak. With the sign function's
coupled iteration (Higham 2008, section 6.7) Y -> X^1/2 and Z -> X^-1/2,

    R = Z Y,        P = a I + b R + c R^2,        Y <- Y P,        Z <- P Z,

begun with Y = X / t for a t above every eigenvalue, and Z = I. On a singular value s of Y^1/2 a step acts as the odd
polynomial s (a + b s^2 + c s^4); its coefficients are those that come nearest to 1 on the interval in which s is known
to lie, from the damping below and t above, so that five or six steps are enough where a fixed Newton-Schulz iteration
takes twenty (Amsel et al. 2025 choose the polynomials of the matrix sign so).

In float32 it is as exact as eigenvectors are: both lose the condition number. What comes out is checked: Z X Z must act
on a vector as I does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kfacore.host import full_precision

__all__ = ["Step", "inverse_roots", "plan", "ratios"]

Step = tuple[float, float, float]
"""a, b and c."""

_ABOVE = 1.01
"""t over a norm: rounding must not put an eigenvalue above it."""

_ACCEPTED = 1e-2
"""Of Z X Z v - v, relative to v: a preconditioner that is off by that is as good as another one."""

_NEAR = 0.02
"""Distance of singular values from 1 from which the third-order iteration takes over."""

_PARTS = 4
"""Of an octave, to which the lower end of an interval is rounded down: so plans are few, and each is made once."""


def ratios(bases: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[float | None]:
    """Of each damped factor X + c I, c over t; with one wait for the device in all.

    None where the iteration cannot succeed: c is lost in rounding, or something is not finite.
    """
    tops = [torch.minimum(X.diagonal().sum(), torch.linalg.matrix_norm(X)) for X in bases]
    damping = torch.stack([c.to(t.dtype) for c, t in zip(shifts, tops, strict=True)])
    found = (damping / (_ABOVE * (torch.stack(tops) + damping))).tolist()
    least = 8 * torch.finfo(bases[0].dtype).eps
    return [ratio if least < ratio < 1.0 else None for ratio in found]


def inverse_roots(
    damped: Tensor,  # (b, d, d)
    shifts: Tensor,  # (b,)
    ratio: float,
) -> tuple[Tensor, Tensor]:
    """X^-1/2 of each matrix, exactly symmetric, and whether it is right, (b,); nothing waits.

    Args:
        damped: X, symmetric with eigenvalues of at least c.
        shifts: c of each.
        ratio: The smallest of `ratios` among them.
    """
    t = (shifts / ratio).to(damped.dtype)[:, None, None]
    low = 2.0 ** (math.floor(0.5 * _PARTS * math.log2(ratio)) / _PARTS)
    steps = plan(low, torch.finfo(damped.dtype).eps)
    with full_precision():  # rounded to ten bits the two would drift apart
        Z = _iterate(damped / t, steps).mul_(t.rsqrt())
        Z = (Z + Z.mT).mul_(0.5)
        probe = torch.arange(1.0, damped.shape[1] + 1.0, dtype=damped.dtype, device=damped.device).cos_()
        again = (Z @ (damped @ (Z @ probe).unsqueeze(2))).squeeze(2)
    return Z, (again - probe).norm(dim=1) <= _ACCEPTED * probe.norm()  # a comparison with NaN is false


def _iterate(Y: Tensor, steps: Sequence[Step]) -> Tensor:
    """Z of the iteration."""
    Z: Tensor | None = None
    for number, (a, b, c) in enumerate(steps, start=1):
        R = Y if Z is None else Z @ Y
        P = torch.baddbmm(R, R, R, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Z = P if Z is None else P @ Z
        if number < len(steps):
            Y = Y @ P
    assert Z is not None
    return Z


@lru_cache
def plan(low: float, eps: float) -> tuple[Step, ...]:
    """Coefficients of each step for singular values in [low, 1], until they are 1 to eps."""
    high, steps = 1.0, list[Step]()
    while True:
        away = max(1.0 - low, high - 1.0)
        if away < _NEAR:  # what the best polynomial comes to
            steps.append((1.875, -1.25, 0.375))
            distance = 5.0 * away**3
            if distance <= eps:
                return tuple(steps)
        else:
            step, distance = _nearest(low, high)
            steps.append(step)
        low, high = 1.0 - distance, 1.0 + distance


def _nearest(low: float, high: float) -> tuple[Step, float]:
    """The odd polynomial of degree five that is nearest to 1 on an interval, and its distance from 1.

    It takes 1 - E, 1 + E, 1 - E and 1 + E in turn at the ends and at its two extremes (Remez's exchange).
    """
    inner = low + 0.3 * (high - low), low + 0.75 * (high - low)
    a = b = c = distance = 0.0
    for _ in range(50):
        points = np.array([low, *inner, high])
        rows = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], 1)
        a, b, c, distance = (float(x) for x in np.linalg.solve(rows, np.ones(4)))
        # The extremes: a + 3 b s^2 + 5 c s^4 = 0.
        middle, spread = -3 * b / (10 * c), math.sqrt(max(9 * b * b - 20 * a * c, 0.0)) / (10 * c)
        before, inner = inner, (math.sqrt(max(middle - spread, low**2)), math.sqrt(middle + spread))
        if max(abs(x - y) for x, y in zip(before, inner, strict=True)) <= 1e-10 * high:
            break
    return (a, b, c), abs(distance)
