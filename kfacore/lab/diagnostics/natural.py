r"""The exact natural gradient without a matrix: conjugate gradients on products with the exact Fisher.

    x = B^-1 g,       B = F + (lambda + eta) I                       (paper, sections 2.2 and 6.1)

-x is the minimum of the exact quadratic model, and 1/2 g^T x the largest decrease that any update can buy from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.lab.diagnostics.exact import Blocks, ExactModel, axpy, dot, norm
from kfacore.roles.inverse import Inverse

__all__ = ["NaturalGradient", "conjugate_gradients", "natural_gradient"]


@dataclass(frozen=True)
class NaturalGradient:
    """B^-1 g and how well it was found.

    Attributes:
        blocks: x.
        decrease: 1/2 g^T x, the best possible decrease of the quadratic model.
        damping: lambda + eta.
        cases: Cases of the exact Fisher.
        iterations: Products with B that the search took.
        residual: ||B x - g|| / ||g||, computed anew at the end.
        converged: Whether the residual reached the tolerance.
    """

    blocks: Blocks
    decrease: float
    damping: float
    cases: int
    iterations: int
    residual: float
    converged: bool


def natural_gradient(
    exact: ExactModel,
    gradient: Sequence[Tensor] | None = None,
    *,
    preconditioner: Inverse | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> NaturalGradient:
    """Solve B x = g.

    Args:
        exact: The exact quadratic model.
        gradient: g; computed if left out.
        preconditioner: An approximation whose `solve` speeds the search up. It changes the way, not the end: the
            residual is measured with the exact Fisher.
        tolerance: Relative residual to stop at.
        max_iterations: Products with B at most.

    Raises:
        ConfigError: The tolerance or the number of iterations makes no sense.
    """
    if not tolerance > 0 or max_iterations < 1:
        raise ConfigError(
            f"conjugate gradients need a tolerance > 0 and at least 1 iteration, found {tolerance:g} and "
            f"{max_iterations}"
        )
    g = exact.gradient() if gradient is None else list(gradient)
    solve = None if preconditioner is None else preconditioner.solve
    x, iterations = conjugate_gradients(exact.curvature, g, solve, tolerance=tolerance, max_iterations=max_iterations)
    size = norm(g)
    residual = norm(axpy(-1.0, g, exact.curvature(x))) / size if size > 0 else 0.0
    return NaturalGradient(
        blocks=x,
        decrease=0.5 * dot(g, x),
        damping=exact.damping,
        cases=exact.cases,
        iterations=iterations,
        residual=residual,
        converged=residual <= 2.0 * tolerance,  # the recurrence's residual drifts from the true one by rounding
    )


def conjugate_gradients(
    multiply: Callable[[Sequence[Tensor]], Blocks],
    g: Sequence[Tensor],
    precondition: Callable[[Sequence[Tensor]], Blocks] | None,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Blocks, int]:
    """Preconditioned conjugate gradients from zero (Hestenes and Stiefel 1952).

    Args:
        multiply: v -> B v, symmetric positive (semi-)definite.
        g: The right-hand side.
        precondition: v -> M^-1 v, symmetric positive definite; the identity if left out.
        tolerance: Stop at ||r|| <= tolerance ||g||.
        max_iterations: Products with B at most.

    Returns:
        x and the number of products. Directions without curvature end the search: g then has a part outside B's range.
    """
    x = [block * 0.0 for block in g]
    r = list(g)
    target = tolerance * norm(g)
    if norm(r) <= target:
        return x, 0
    y = r if precondition is None else precondition(r)
    p = y
    ry = dot(r, y)
    for iteration in range(1, max_iterations + 1):
        Bp = multiply(p)
        curvature = dot(p, Bp)
        if not curvature > 0.0:
            return x, iteration
        step = ry / curvature
        x = axpy(step, p, x)
        r = axpy(-step, Bp, r)
        if norm(r) <= target:
            return x, iteration
        y = r if precondition is None else precondition(r)
        ry, before = dot(r, y), ry
        p = axpy(ry / before, p, y)
    return x, max_iterations
