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

from kfacore.curvature.preconditioner import Preconditioner
from kfacore.lab.diagnostics.exact import ExactModel, dot, norm
from kfacore.lab.diagnostics.natural import NaturalGradient
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment
from kfacore.roles.samples import LayerSamples
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
    samples: Sequence[LayerSamples],
    gammas: Sequence[float],
    *,
    pi: PiRule = "layer",
) -> Iterator[tuple[float, Inverse]]:
    """The approximation's inverse at each gamma, one at a time: inverses of large nets fill the memory.

    Args:
        approx: The approximation.
        layers: The layers that the samples belong to.
        samples: What they saw; taken as one mini-batch.
        gammas: Strengths of the damping.
        pi: How gamma is split, see `kfacore.curvature.linalg.pi_of`.

    Raises:
        NumericalError: A factor could not be factorised; names the layer.
        UnsupportedModelError: The approximation refuses this net.
    """
    like = samples[0].inputs
    made = Preconditioner(approx, layers, like, decay=0.95)
    made.update(samples)
    scalars = [torch.tensor(gamma, dtype=torch.float64, device=like.device) for gamma in gammas]
    if any(kind.refreshed is not Moment.refreshed for kind in approx.moments):
        # Averages kept in an inverse's coordinates (EKFAC) need one before they mean anything: the first round gives
        # the coordinates, the second one the averages in them.
        made.use(approx.factorise(made.moments).damped(scalars[len(scalars) // 2], pi=pi))
        made.update(samples)
    factorisation = approx.factorise(made.moments)
    for gamma, scalar in zip(gammas, scalars, strict=True):
        yield gamma, factorisation.damped(scalar, pi=pi)


def measure_update(
    exact: ExactModel, gradient: Sequence[Tensor], natural: NaturalGradient, inverse: Inverse, approx: str, gamma: float
) -> UpdateQuality:
    """Measure Delta = -F-hat^-1 g.

    Args:
        exact: The exact quadratic model.
        gradient: g.
        natural: B^-1 g.
        inverse: F-hat^-1.
        approx: Name for the result.
        gamma: Its damping, for the result.
    """
    update = [-block for block in inverse.solve(gradient)]
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
