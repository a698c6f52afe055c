"""From what an estimator sends back to what every block sees of it, and to the averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfacore.curvature.preconditioner import Preconditioner
from kfacore.network import Accumulated, Linearization
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.drawing import Share
from kfacore.optim.joint import BoundJoint
from kfacore.optim.parts import Parts
from kfacore.optim.phases import At
from kfacore.optim.units import Units, sizes_of, units_of
from kfacore.parallel.ranks import Ranks
from kfacore.roles.block import Block
from kfacore.roles.moment import divisor_of
from kfacore.roles.samples import Samples, mean_diagonal, traces

__all__ = ["Statistics", "mean_curvature", "seen", "traces_of"]


class Statistics:
    """What one mini-batch adds to the averages of each block, and in the first step to lambda and to the units.

    Args:
        parts: The optimizer's parts.
        units: What the weights of each block are measured in.
    """

    def __init__(self, parts: Parts, units: Units) -> None:
        self._parts, self._units = parts, units

    def measure_inputs(self, at: At, preconditioner: Preconditioner) -> None:
        """Choose the units before anything is averaged in, by a pass that sends zeros back and draws nothing."""
        parts, ranks = self._parts, self._parts.ranks
        if preconditioner.moments.updates or parts.damping.config.units == "parameters":
            return
        with ranks.together("units of inputs"):
            nothing = torch.zeros_like(at.batch.statistics_outputs()).unsqueeze(0)
            found = seen(at.batch, at.sampled, nothing, parts.generator, drawn=True, part=self._part(at))
            sizes = sizes_of((samples for _, samples in found), preconditioner.layers, at.loss.device)
        self._units.set(units_of(ranks.sum("units of inputs", sizes)), parts.linearizer.layers)

    def take(self, at: At, preconditioner: Preconditioner) -> tuple[Samples | None, Tensor | None] | None:
        """Average in what the estimator's backward passes show of each block; the first step tells lambda of it.

        Of several processes each returns what it saw, for `add_up`: samples, unless it has added up those of
        micro-batches, and in the first step their traces.
        """
        estimator, generator, part = self._parts.estimator, self._parts.generator, self._part(at)
        vectors = at.sampled.statistics(at.batch.statistics_outputs(), estimator, generator, part)
        shares = seen(at.batch, at.sampled, vectors, generator, drawn=estimator.draws, part=part)
        found = ((share, self._units.of(samples)) for share, samples in shares)
        if not self._parts.ranks.alone:
            return self._own(at, preconditioner, found)
        diagonal: Tensor | float = 0.0
        for share, samples in found:
            preconditioner.add(samples)
            if at.step == 1:
                diagonal = diagonal + share * mean_diagonal(samples, preconditioner.layers)
        preconditioner.commit()
        if isinstance(diagonal, Tensor):
            self._parts.damping.observe(diagonal)
        return None

    def add_up(self, at: At, preconditioner: Preconditioner, own: Samples | None, sums: Tensor | None) -> None:
        """The same of several processes together, in which they wait for each other."""
        if at.several:
            preconditioner.commit()
        else:
            assert own is not None
            preconditioner.update(own)
        if at.step == 1:
            self._parts.damping.observe(mean_curvature(sums, self._parts.ranks, preconditioner.layers, at.loss.device))

    def _part(self, at: At) -> Share | None:
        """Which cases are this process's."""
        ranks = self._parts.ranks
        cases = self._parts.estimator.cases(at.whole.cases, at.positions)
        return None if ranks.alone else Share(at.whole, cases, ranks)

    def _own(
        self, at: At, preconditioner: Preconditioner, found: Iterator[tuple[float, Samples]]
    ) -> tuple[Samples | None, Tensor | None]:
        """What this process saw: not averaged in before all know that nothing failed."""
        sums: Tensor | None = None
        own: Samples | None = None
        for _, own in found:
            preconditioner.check(own)
            if at.several:
                preconditioner.add(own)
            if at.step == 1:
                these = traces_of(own, preconditioner.layers, at.loss.device)
                sums = these if sums is None else sums + these
        return None if at.several else own, sums


def seen(
    batch: Linearization | Accumulated,
    bound: BoundLoss | BoundJoint,
    vectors: Tensor,  # (k, n, ..., o)
    generator: torch.Generator,
    *,
    drawn: bool = False,
    part: Share | None = None,
) -> Iterator[tuple[float, Samples]]:
    """What each block sees of vectors of the loss (`BoundLoss.statistics`), with the S of their squares.

    A micro-batch at a time, each with its share of S, or all at once with the share 1.

    Args:
        batch: The mini-batch.
        bound: Its loss.
        vectors: One set a backward pass, of the estimator's cases.
        drawn: Whether they are independent draws of mean zero, whose products vanish without signs.
        generator: Source of the random signs that general networks need (`Linearization.signs`).
        part: Which cases these are of those that several processes share; S is then what they add to it.
    """
    z = batch.statistics_outputs()
    n = len(z)
    if n == 0:  # all are other processes'
        if part is not None and not (batch.plain or drawn):
            part.rows(z.shape[1:-1].numel())  # which processes ask of each other
        yield 1.0, [None for _ in batch.layers]
        return
    total = bound.total(n) if part is None else bound.weight(n)
    if batch.plain and bound.valid is None and not isinstance(total, Tensor) and total == n:
        yield from batch.seen(vectors)
        return
    if not (batch.plain or drawn):
        positions = z.shape[1:-1].numel()
        vectors = vectors * batch.signs(z, generator, None if part is None else part.rows(positions))
    valid = None if bound.valid is None else bound.valid[:n]
    yield from batch.seen(vectors, valid=valid, total=total)


def traces_of(samples: Samples, layers: Sequence[Block], device: torch.device) -> Tensor:  # (2 blocks + 1,) float64
    """What `mean_curvature` needs of a part of a mini-batch: sums, which may be added up over parts."""
    sums, S = traces(samples, layers).to(device), divisor_of(samples)
    return torch.cat([sums.flatten(), torch.as_tensor(S, dtype=torch.float64, device=device).view(1)])


def mean_curvature(
    sums: Tensor | None, ranks: Ranks, layers: Sequence[Block], device: torch.device
) -> Tensor:  # () float64
    """Mean diagonal entry of the Fisher of all that several processes have seen (`kfacore.roles.samples`).

    Args:
        sums: Of this process, see `traces_of`; None if it saw nothing.
        ranks: The processes.
        layers: The blocks.
        device: Where the parameters are.
    """
    if sums is None:
        sums = torch.zeros(2 * len(layers) + 1, dtype=torch.float64, device=device)
    (total,) = ranks.sum("curvature", [sums])
    sizes = torch.tensor([float(layer.size) for layer in layers], dtype=torch.float64, device=device)
    some: Tensor = total[len(layers) : -1] > 0
    mean: Tensor = total[: len(layers)].sum() / total[-1] / sizes[some].sum()
    return mean
