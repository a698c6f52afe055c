r"""The cost of a step on N ranks, from operations, bytes and latency.

A step of a guest in data-parallel training. With C the operations of the gradient of a whole mini-batch, P the
parameters, X_j (d_j, d_j) the factors, T steps between two refreshes, tau the share of the mini-batch that statistics
are taken from:

    gradient     3 C / N operations; P numbers all-reduced, hidden behind the backward pass as far as that is long
    statistics   tau (C + 2 sum over blocks of rows (d_in^2 + d_out^2)) / N operations, once in T steps
    moments      sum d_j (d_j + 1) / 2 numbers, once in T steps
    refresh      c sum d_j^3 operations, once in T steps: by all, or divided
    solve        2 sum over blocks of d_in d_out (d_in + d_out) operations: by all, or divided

and three ways to divide:

    all     every rank does all factor work; moments are all-reduced
    every   a factor has an owner, who factorises it; inverses are sent to every rank, which solves every block
    owner   a factor has an owner, who keeps it, solves its blocks, and sends directions in every step

An all-reduce of n bytes takes 2 (N - 1) / N n / B + 2 L log2 N, sending n bytes that are spread over owners to all of
them half of it (a ring's bytes, a tree's latency: Thakur, Rabenseifner & Gropp 2005). B is that of the slowest link in
use. Owners are `kfacore.parallel.cores.owners`, so that the share of the busiest rank is not an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from benchmarks.ranks.shapes import Net
from kfacore.parallel.cores import owners

__all__ = ["VARIANTS", "Cost", "Machine", "Schedule", "Variant", "busiest", "cost", "triangles"]

Variant = Literal["all", "every", "owner"]
VARIANTS: tuple[Variant, ...] = ("all", "every", "owner")
_BYTES = 4
"""Of a number that is sent: float32."""


@dataclass(frozen=True)
class Machine:
    """What a rank is, and how ranks are joined.

    Attributes:
        name: For tables.
        rate: Operations a second of forward and backward passes.
        products: Of products in the factors' precision: statistics and solves.
        factorisations: Of factorisations, counted as c d^3.
        near: Bytes a second between ranks of one node.
        far: Bytes a second of a rank between nodes.
        node: Ranks of a node.
        latency: Seconds until a message has begun to arrive.
    """

    name: str
    rate: float
    products: float
    factorisations: float
    near: float
    far: float
    node: int
    latency: float

    def bandwidth(self, ranks: int) -> float:
        """Of the slowest link that so many ranks use."""
        return self.near if ranks <= self.node else self.far


@dataclass(frozen=True)
class Schedule:
    """How often, and of how much.

    Attributes:
        every: T, steps from one refresh to the next.
        share: tau, the share of the mini-batch that statistics are taken from.
        work: c, operations of a factorisation over d^3: 1 for a Cholesky factor and inverse, 9 for an eigenproblem and
            2 more for a product.
    """

    every: int = 10
    share: float = 1.0
    work: float = 11.0


@dataclass(frozen=True)
class Cost:
    """Of a mean step; seconds unless said otherwise.

    Attributes:
        gradient: Forward and backward pass.
        exposed: Sums of gradients that the backward pass does not hide.
        statistics: Backward pass and products of statistics.
        moments: Sums of moments.
        refresh: Factorisations of the busiest rank.
        inverses: Sending inverses.
        solve: Solves of the busiest rank.
        directions: Sending directions.
        share: The busiest rank's share of factor work.
        ordinary: Bytes that a rank hands over in a step without refresh.
        due: Bytes that a rank hands over more in one with.
        memory: Bytes of moments and inverses on the busiest rank.
        burst: Seconds of what a refresh adds, if it all happens in one step.
    """

    gradient: float
    exposed: float
    statistics: float
    moments: float
    refresh: float
    inverses: float
    solve: float
    directions: float
    share: float
    ordinary: float
    due: float
    memory: float
    burst: float

    @property
    def plain(self) -> float:
        """The step of the optimizer that K-FAC is a guest of."""
        return self.gradient + self.exposed

    @property
    def step(self) -> float:
        """All of it, the refresh spread over the steps between two."""
        mean = self.statistics + self.moments + self.refresh + self.inverses
        return self.plain + mean + self.solve + self.directions

    @property
    def slowest(self) -> float:
        """The step in which everything is due, if nothing is spread."""
        return self.plain + self.solve + self.directions + self.burst


def triangles(net: Net) -> int:
    """Numbers of the upper triangles of all factors."""
    return sum(d * (d + 1) // 2 for d in net.sides)


def busiest(costs: list[float], ranks: int) -> tuple[float, list[int]]:
    """The largest share of the costs that one rank has, and who owns what."""
    found = owners(costs, ranks)
    loads = [0.0] * ranks
    for cost, owner in zip(costs, found, strict=True):
        loads[owner] += cost
    return max(loads) / sum(costs), found


def cost(net: Net, machine: Machine, ranks: int, variant: Variant, schedule: Schedule | None = None) -> Cost:
    """The cost of a step.

    Args:
        net: The net, with its whole mini-batch.
        machine: What a rank is.
        ranks: N.
        variant: Who does factor work.
        schedule: How often.
    """
    plan = Schedule() if schedule is None else schedule
    divided = variant != "all"
    forward = net.products * net.batch
    gradient = 3.0 * forward / ranks / machine.rate
    sums = _all_reduce(machine, ranks, _BYTES * net.size)
    exposed = max(0.0, sums - 2.0 / 3.0 * gradient)
    squares = sum(block.rows * (block.d_in**2 + block.d_out**2) for block in net.blocks)
    per_rank = plan.share * net.batch / ranks
    statistics = per_rank * (net.products / machine.rate + 2.0 * squares / machine.products)
    numbers = triangles(net)
    moments = _all_reduce(machine, ranks, _BYTES * numbers) * (0.5 if variant == "owner" else 1.0)
    share, owned = busiest([float(d) ** 3 for d in net.sides], ranks) if divided else (1.0, [])
    refresh = share * plan.work * sum(float(d) ** 3 for d in net.sides) / machine.factorisations
    inverses = _send(machine, ranks, _BYTES * numbers) if variant == "every" else 0.0
    solves = [2.0 * block.size * (block.d_in + block.d_out) for block in net.blocks]
    part, _ = busiest(solves, ranks) if variant == "owner" else (1.0, [])
    solve = part * sum(solves) / machine.products
    kron = sum(block.size for block in net.blocks)
    directions = _send(machine, ranks, _BYTES * kron) if variant == "owner" else 0.0
    alone = ranks == 1
    burst = statistics + moments + refresh + inverses
    full = 2.0 * _BYTES * sum(d * d for d in net.sides)
    return Cost(
        gradient=gradient,
        exposed=exposed,
        statistics=statistics / plan.every,
        moments=moments / plan.every,
        refresh=refresh / plan.every,
        inverses=inverses / plan.every,
        solve=solve,
        directions=directions,
        share=share,
        ordinary=0.0 if alone else _BYTES * (net.size + (part * kron if variant == "owner" else 0.0)),
        due=0.0 if alone else _BYTES * (numbers + (_most_owned(net, owned, ranks) if variant == "every" else 0)),
        memory=full * (share if variant == "owner" else 1.0),
        burst=burst,
    )


def _most_owned(net: Net, owned: list[int], ranks: int) -> int:
    """Numbers of the inverses that one rank sends, at most."""
    found = [0] * ranks
    for d, owner in zip(net.sides, owned, strict=True):
        found[owner] += d * (d + 1) // 2
    return max(found)


def _rounds(machine: Machine, ranks: int) -> float:
    return machine.latency * math.log2(ranks)


def _send(machine: Machine, ranks: int, size: float) -> float:
    """Seconds until every rank has ``size`` bytes that are spread over owners."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) / ranks * size / machine.bandwidth(ranks) + _rounds(machine, ranks)


def _all_reduce(machine: Machine, ranks: int, size: float) -> float:
    """Seconds until every rank has the sum of ``size`` bytes."""
    return 2.0 * _send(machine, ranks, size)
