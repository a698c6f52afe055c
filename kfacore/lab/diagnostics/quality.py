r"""How good an approximation's update is, measured against the exact natural gradient (paper, section 6.4, Figure 7).

For Delta = -F-hat^-1 g and the exact quadratic model with B = F + (lambda + eta) I:

    cosine      of Delta and the natural gradient -B^-1 g
    re-scaled   best decrease along Delta, (g^T Delta)^2 / (2 Delta^T B Delta), as a share of 1/2 g^T B^-1 g
    as it is    decrease by Delta itself, -(1/2 Delta^T B Delta + g^T Delta), as the same share; negative if it hurts
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacore.curvature.faults import examine
from kfacore.curvature.joined import Joined
from kfacore.lab.diagnostics.exact import ExactModel, dot, norm
from kfacore.lab.diagnostics.natural import NaturalGradient
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment
from kfacore.roles.samples import Samples
from kfacore.schema.slots import PiRule

__all__ = ["UpdateQuality", "gamma_grid", "inverses", "measure_update"]


@dataclass(frozen=True)
class UpdateQuality:
    """One approximation at one gamma.

    Attributes:
        approx: Name of the approximation.
        gamma: Strength of its damping.
        cosine: Of its update and the natural gradient.
        rescaled: Decrease of the quadratic model with the best step length, as a share of the best possible.
        unscaled: The same with the update as it is.
        alpha: The best step length.
        improvement_rescaled: What the re-scaled update does to the objective, h(theta) - h(theta + alpha Delta), on the
            same cases.
        improvement_unscaled: The same for the update as it is; None where the objective is not finite there.
        notices: What needed more than a plain factorisation.
    """

    approx: str
    gamma: float
    cosine: float
    rescaled: float
    unscaled: float
    alpha: float
    improvement_rescaled: float | None
    improvement_unscaled: float | None
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**vars(self), "notices": list(self.notices)}


def gamma_grid(gamma: float, decades: int = 3, per_decade: int = 2) -> list[float]:
    """Gammas around one, evenly spaced in the logarithm, in rising order; the middle one is `gamma` itself.

    Args:
        gamma: The middle, > 0.
        decades: How many powers of ten to each side.
        per_decade: Values in a power of ten.
    """
    reach = decades * per_decade
    return [gamma * 10.0 ** (i / per_decade) for i in range(-reach, reach + 1)]


def inverses(
    approx: Approximation,
    layers: Sequence[Block],
    samples: Samples,
    gammas: Sequence[float],
    *,
    pi: PiRule = "layer",
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[float, Inverse]]:
    """The approximation's inverse at each gamma, one at a time: inverses of large nets fill the memory.

    Args:
        approx: The approximation; blocks that it does not serve get built-in curvature, as in training.
        layers: The blocks that the samples belong to.
        samples: What they saw; taken as one mini-batch.
        gammas: Strengths of the damping.
        pi: How gamma is split, see `kfacore.curvature.linalg.pi_of`.
        pairs: Blocks (i, j) that are coupled, a forest; each block and the next if left out.

    Raises:
        NumericalError: A factor could not be factorised, or a solution is not finite; names the block.
        PluginError: The approximation raised what is no error of kfacore, or solved to what is no block; names both.
        UnsupportedModelError: The approximation refuses this net.
    """
    like = next(s.gradients for s in samples if s is not None)
    joined = Joined(approx, layers, pairs)
    moments = joined.start(like)
    moments.update(samples, 0.95)
    scalars = [torch.tensor(gamma, dtype=torch.float64, device=like.device) for gamma in gammas]
    if any(kind.refreshed is not Moment.refreshed for kind in approx.moments):
        # Averages kept in an inverse's coordinates (EKFAC) need one before they mean anything: the first round gives
        # the coordinates, the second one the averages in them.
        moments.refreshed(joined.damped(joined.factorise(moments), scalars[len(scalars) // 2], pi))
        moments.update(samples, 0.95)
    factorisation = joined.factorise(moments)
    for gamma, scalar in zip(gammas, scalars, strict=True):
        inverse = joined.damped(factorisation, scalar, pi)
        if gamma > 0:  # without damping a singular factor may make anything of ones
            joined.try_out(inverse, like)
        yield gamma, inverse


def measure_update(
    exact: ExactModel,
    gradient: Sequence[Tensor],
    natural: NaturalGradient,
    inverse: Inverse,
    approx: str,
    gamma: float,
    maker: str = "",
) -> UpdateQuality:
    """Measure Delta = -F-hat^-1 g.

    Args:
        exact: The exact quadratic model.
        gradient: g.
        natural: B^-1 g.
        inverse: F-hat^-1.
        approx: Name for the result.
        gamma: Its damping, for the result.
        maker: Who made it, for errors; the name if left out.

    Raises:
        PluginError: The solution is no vector of blocks; names the approximation and the block.
        NumericalError: It is not finite; likewise.
    """
    solved = inverse.solve(gradient)
    examine([maker or f"approx '{approx}'"] * len(exact.layers), exact.layers, solved, gradient)
    update = [-block for block in solved]
    slope, bend = dot(gradient, update), exact.quadratic_form(update)
    alpha = -slope / bend if bend > 0 else 0.0
    lengths = norm(update) * norm(natural.blocks)
    best = natural.decrease
    return UpdateQuality(
        approx=approx,
        gamma=gamma,
        cosine=-dot(update, natural.blocks) / lengths if lengths > 0 else 0.0,
        rescaled=-0.5 * alpha * slope / best if best > 0 else 0.0,
        unscaled=-(0.5 * bend + slope) / best if best > 0 else 0.0,
        alpha=alpha,
        improvement_rescaled=_improvement(exact, [alpha * block for block in update]),
        improvement_unscaled=_improvement(exact, update),
        notices=tuple(str(notice) for notice in inverse.notices),
    )


def _improvement(exact: ExactModel, delta: Sequence[Tensor]) -> float | None:
    change = exact.objective - exact.objective_at(delta)
    return change if math.isfinite(change) else None
