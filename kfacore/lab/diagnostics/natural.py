r"""The exact natural gradient without a matrix: conjugate gradients on products with the exact Fisher.

    x = B^-1 g,       B = F + (lambda + eta) I                       (paper, sections 2.2 and 6.1)

-x is the minimum of the exact quadratic model, and 1/2 g^T x the largest decrease that any update can buy from it. The
search is the optimizer's own, `kfacore.optim.local.LocalModel.go_on`, to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.lab.diagnostics.exact import Blocks, ExactModel, axpy, dot, norm
from kfacore.network import BlockVector
from kfacore.registry import get_registry
from kfacore.roles.inverse import Inverse

__all__ = ["NaturalGradient", "natural_gradient"]


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
    size, iterations, x = norm(g), 0, BlockVector.zeros(exact.rules)
    local = exact.local(g)
    target = tolerance * size

    def enough(residual: BlockVector) -> bool:
        nonlocal iterations
        if float(residual.flat.norm()) <= target:
            return True
        iterations += 1
        return False

    if size > 0:
        rule = get_registry().build("momentum", "quadratic-model")
        buffers = [BlockVector.zeros(exact.rules) for _ in range(3)]
        solver = _Identity() if preconditioner is None else preconditioner
        local.go_on(x, local.push([x])[0], solver, rule, max_iterations, buffers, enough)
    blocks = [-block for block in x.blocks]
    residual = norm(axpy(-1.0, g, exact.curvature(blocks))) / size if size > 0 else 0.0
    return NaturalGradient(
        blocks=blocks,
        decrease=0.5 * dot(g, blocks),
        damping=exact.damping,
        cases=exact.cases,
        iterations=iterations,
        residual=residual,
        converged=residual <= 2.0 * tolerance,  # another order of summation rounds differently
    )


class _Identity:
    """No preconditioner."""

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(out), list(blocks))
