r"""Curvature that processes keep a part of each (``memory = "owner"``).

A block belongs to one process, together with the blocks that an approximation of pairs couples it with. Statistics,
factors and inverses of a block live there alone:

    a mini-batch's sums        are added up at the owner, as the upper triangles
    factorisation, damping     by the owner, nothing is sent but pi where it is that of the net
    F-hat^-1 v                 by the owner, who sends the block to all

So a process keeps about 1 / W of the curvature, and sends its part of the direction in every step, where otherwise it
keeps all, solves all, and sends inverses at refreshes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfacore.curvature.joined import Joined, mean_pi
from kfacore.curvature.pieces import Piece, Pieces, load_pieces, part_of
from kfacore.curvature.places import by_name, from_names
from kfacore.curvature.preconditioner import Preconditioner, add_up
from kfacore.errors import ConfigError, NumericalError
from kfacore.parallel.background import Made
from kfacore.parallel.division import everyones, owners, refuse
from kfacore.parallel.pace import current_pace
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block, Side
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments
from kfacore.roles.samples import Samples, rows_a_case
from kfacore.schema.slots import PiRule

__all__ = ["Owned", "OwnedInverse", "preconditioner", "require_divisible", "shares"]

_T = TypeVar("_T")


def preconditioner(
    approx: Approximation,
    layers: Sequence[Block],
    like: Tensor,
    decay: float,
    pairs: Sequence[tuple[int, int]] | None = None,
    ranks: Ranks = ALONE,
    bound: Sequence[tuple[int, int]] | None = None,
) -> Preconditioner:
    """A `Preconditioner` that keeps everything, or this process's part, as ``approx.config.memory`` says.

    Args:
        approx: As `Preconditioner` takes it, as everything else.
        layers: The blocks.
        like: A parameter.
        decay: Largest weight of the past.
        pairs: What is coupled.
        ranks: The processes.
        bound: Pairs of blocks that must have one owner. With it there are owners whatever ``memory`` says.

    Raises:
        ConfigError: The approximation cannot be kept in parts.
    """
    require_divisible(approx, sharded=bound is not None)
    if bound is None and (ranks.alone or approx.config.memory == "all"):
        return Preconditioner(approx, layers, like, decay, pairs, ranks)
    return Owned(approx, layers, like, decay, pairs, ranks, bound or ())


def require_divisible(approx: Approximation, *, sharded: bool = False) -> None:
    """Refuse ``memory = "owner"``, or sharded parameters, for approximations that need all blocks in one place.

    Raises:
        ConfigError: It is one of these; names it.
    """
    if approx.divides or not (sharded or approx.config.memory == "owner"):
        return
    what = "parameters cannot be sharded" if sharded else "memory = 'owner' cannot be"
    raise ConfigError(
        f"approx = {approx.config.kind!r} needs the statistics of all blocks in one place (it does not say `divides`), "
        f"so that {what}; use approx = 'blockdiag'" + ("" if sharded else ", or memory = 'all'")
    )


def shares(joined: Joined, ranks: int, bound: Sequence[tuple[int, int]] = ()) -> list[list[int]]:
    """Which blocks each process keeps: coupled ones together, largest first by operations of a refresh and a solve.

    Args:
        joined: Who serves which blocks, and what is coupled.
        ranks: Number of processes.
        bound: More pairs of blocks that must have one owner.

    Returns:
        Numbers of blocks, ascending, for each process; none where there are more processes than uncoupled groups.
    """
    group = list(range(len(joined.layers)))
    for i, j in [*(joined.coupled if joined.approx.structure == "chain" else ()), *bound]:
        old, new = group[j], group[i]
        group = [new if each == old else each for each in group]
    groups = [[i for i, each in enumerate(group) if each == first] for first in dict.fromkeys(group)]
    who = owners([sum(_cost(joined.layers[i]) for i in blocks) for blocks in groups], ranks)
    return [sorted(i for k, blocks in enumerate(groups) if who[k] == rank for i in blocks) for rank in range(ranks)]


def _cost(block: Block) -> float:
    """Operations of a refresh and a solve."""
    if block.kind == "diagonal":
        return float(block.size)
    if block.kind == "full":
        return float(block.groups * block.d_in**3)
    sides = ((block.d_in, block.input_side), (block.d_out, block.output_side))
    whole = [d for d, side in sides if side is Side.FULL]
    return float(block.groups * sum(d**3 for d in whole) + block.size * (1 + sum(whole)))


class OwnedInverse(Inverse):
    """F-hat, of which each process has the blocks that it owns; all processes ask it together.

    Args:
        own: This process's blocks.
        groups: The blocks of each process.
        ranks: The processes.
        notices: What must be reported, of all processes.
    """

    def __init__(
        self, own: Pieces, groups: Sequence[Sequence[int]], ranks: Ranks, notices: Sequence[Notice] = ()
    ) -> None:
        self.layers, self.own, self.notices = own.layers, own, tuple(notices)
        self._groups, self._ranks = groups, ranks

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Each block by its owner, who sends it to all."""
        out = [torch.empty_like(block) for block in blocks]
        self.solve_into(blocks, out)
        return out

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """The same over ``out``."""
        with self._ranks.together("solve"):
            self.own.solve_into(blocks, out)
        self._send(out)

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Each block by its owner, who sends it to all."""
        with self._ranks.together("multiply"):
            out = self.own.multiply(blocks)
        self._send(out)
        return out

    def _send(self, out: Sequence[Tensor]) -> None:
        for rank, group in enumerate(self._groups):
            if not group:
                continue
            here = [out[i] for i in group]
            if rank == self._ranks.rank:
                flat = torch.cat([block.reshape(-1) for block in here])
            else:
                flat = here[0].new_empty(sum(block.numel() for block in here))
            self._ranks.broadcast("directions", flat, rank)
            if rank != self._ranks.rank:
                parts = torch.split(flat, [block.numel() for block in here])
                torch._foreach_copy_(here, [part.view(block.shape) for part, block in zip(parts, here, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """This process's blocks."""
        return self.own.state_dict()

    def _like(self) -> Tensor:
        return self.own._like()


class Owned(Preconditioner):
    """Running statistics and inverse of a net, of which this process keeps its own blocks' (`shares`).

    Args:
        approx: As `Preconditioner` takes it, as everything but the last.
        layers: The blocks.
        like: A parameter.
        decay: Largest weight of the past.
        pairs: What is coupled.
        ranks: The processes.
        bound: Pairs of blocks that must have one owner.

    Attributes:
        groups: The blocks of each process.
    """

    def __init__(
        self,
        approx: Approximation,
        layers: Sequence[Block],
        like: Tensor,
        decay: float,
        pairs: Sequence[tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
        bound: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._bound = list(bound)
        super().__init__(approx, layers, like, decay, pairs, ranks)

    def _start(self, like: Tensor) -> Moments:
        self.groups = shares(self.joined, self.ranks.size, self._bound)
        self._parts = [part_of(self.joined, group) for group in self.groups]
        shapes = torch.empty(0, dtype=like.dtype, device="meta")
        self._each: list[Moments] = []
        for rank, part in enumerate(self._parts):
            moments = part.start(like if rank == self.ranks.rank else shapes)
            moments.sum_on(like.device)
            self._each.append(moments)
        own = self._each[self.ranks.rank]
        if any(moments.turns for moments in self._each):
            raise ConfigError(
                f"approx = {self.approx.config.kind!r} keeps statistics in coordinates of its inverse, which other "
                "processes than the owner do not have; use memory = 'all'"
            )
        return own

    @property
    def _group(self) -> list[int]:
        return self.groups[self.ranks.rank]

    @property
    def _own(self) -> Joined:
        return self._parts[self.ranks.rank]

    def update(self, samples: Samples) -> None:
        """Take in what the estimator saw in a mini-batch, each owner what all have seen of its blocks."""
        self.add(samples)
        self.commit()

    def check(self, samples: Samples) -> None:
        """See `Preconditioner.check`."""
        for moments, group in zip(self._each, self.groups, strict=True):
            moments.tallies([samples[i] for i in group])

    def gather(self) -> None:
        """Nothing: the owner has what all have seen."""

    def add(self, samples: Samples) -> None:
        """Take in a part of a mini-batch; until `commit` its sums, or what they are made of, are here."""
        self.rows = rows_a_case(samples, self.layers)
        for moments, group in zip(self._each, self.groups, strict=True):
            moments.add([samples[i] for i in group])

    def forget(self) -> None:
        """Drop what was added since the last `commit`."""
        for moments in self._each:
            moments.forget()

    def commit(self) -> None:
        """Average in what was added, owner by owner; all processes together."""
        updates = self.moments.updates + 1
        for rank, moments in enumerate(self._each):
            add_up(moments, self.ranks, rank)
        self.moments.commit(self.decay)
        self.moments.updates = updates  # also where there is no block
        self._agree_on_rows()

    def _make(self, moments: Moments, gammas: Sequence[Tensor], pi: PiRule, ranks: Ranks) -> Made:
        """Each owner its own; a gamma counts where it went well on all."""
        pace = current_pace()
        before = 0.0 if pace is None else pace.done

        def factorise() -> Factorisation | None:
            return self._own.factorise(moments) if self._group else None

        (factorisation,), failures = self._tried(ranks, [factorise])
        if failures[0] is not None:
            return Made([], [], failures[0])
        split = self._split(factorisation, pi, ranks)

        def damped(gamma: Tensor) -> Pieces:
            if factorisation is None:
                return Pieces(self.layers, [])
            own = gamma if gamma.dim() == 0 else gamma[self._group]
            found = self._own.damped(factorisation, own, split)
            return Pieces(self.layers, [Piece(self._group, self._group, found)])

        found, failures = self._tried(ranks, [partial(damped, gamma) for gamma in gammas])
        own = [() if each is None else [(n.layer, n.message) for n in each.notices] for each in found]
        told = ranks.gather("refresh", (own, 0.0 if pace is None else pace.done - before))
        if pace is not None:  # schedules count what the busiest does, the same number on all
            pace.work(max(done for _, done in told) - (pace.done - before))
        pairs: list[tuple[Tensor, Inverse]] = []
        for i, gamma in enumerate(gammas):
            if failures[i] is None:
                notices = [Notice(*each) for all_of, _ in told for each in all_of[i]]
                pairs.append((gamma, OwnedInverse(found[i], self.groups, self.ranks, notices)))
        failure = next((each for each in reversed(failures) if each is not None), None)
        return Made(pairs, [notice for _, inverse in pairs for notice in inverse.notices], failure)

    def _tried(self, ranks: Ranks, jobs: Sequence[Callable[[], _T]]) -> tuple[list[Any], list[str | None]]:
        """Results, and for each job what could not be factorised on any process; other errors are raised on all."""
        results: list[Any] = []
        failures: list[str | None] = []
        failure: Exception | None = None
        for job in jobs:
            try:
                results.append(job())
                failures.append(None)
            except NumericalError as error:
                results.append(None)
                failures.append(str(error))
            except Exception as error:
                failure = error
                break
        told = None if failure is None else (type(failure).__name__, str(failure))
        found = ranks.gather("factors", (told, failures))
        refuse(failure, [each for each, _ in found])
        columns = zip(*(each for _, each in found), strict=True)
        return results, [next((each for each in of if each is not None), None) for of in columns]

    def _split(self, factorisation: Factorisation | None, pi: PiRule, ranks: Ranks) -> PiRule | Tensor:
        """Pi of the net is the geometric mean over the blocks of all processes."""
        if pi != "net":
            return pi
        logs = None if factorisation is None else factorisation.log_pi()
        flat = torch.zeros(2, dtype=torch.float64, device=self._like.device)
        if logs is not None:
            flat += torch.stack([logs[0].double(), logs[1].double()])
        (found,) = ranks.sum("pi", [flat])
        return "net" if factorisation is None or logs is None else mean_pi(*found.unbind())

    def _try_out(self, inverse: Inverse) -> None:
        assert isinstance(inverse, OwnedInverse)
        with self.ranks.together("trial of the inverse"):
            for piece in inverse.own.pieces:
                self._own.try_out(piece.inverse, self._like)

    def _restart(self) -> bool:
        return bool(self.ranks.most("averages anew", int(super()._restart())))

    def _load(self, state: Any) -> Inverse:
        return OwnedInverse(load_pieces(self.joined, state, set(self._group)), self.groups, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """As if one process had everything, on all of them; all together."""
        state = super().state_dict()
        state["moments"] = by_name(self._own, self._group, state["moments"])
        each = everyones(self.ranks, "state", state, self._like.device)
        named = {name: value for own in each for name, value in own["moments"].items()}
        everything = range(len(self.layers))
        state["moments"] = from_names(self.joined, everything, named, self.moments.updates)
        state["inverse"] = _merged([own["inverse"] for own in each])
        state["background"] = _merged_refresh([own["background"] for own in each])
        return state

    def _load_moments(self, state: dict[str, Any]) -> None:
        shapes = self._like.new_empty(0, device="meta")
        self.joined.start(shapes).load_state_dict(state)  # refuses what is of another net
        named = by_name(self.joined, range(len(self.layers)), state)
        self.moments.load_state_dict(from_names(self._own, self._group, named, state["updates"]))


def _merged(inverses: Sequence[Any]) -> Any:
    """The pieces of all processes; all have an inverse, or none has."""
    if any(inverse is None for inverse in inverses):
        return None
    return {"owned": [piece for inverse in inverses for piece in inverse["owned"]]}


def _merged_refresh(refreshes: Sequence[Any]) -> Any:
    """A refresh under way, with the pieces of all."""
    if any(refresh is None for refresh in refreshes):
        return None
    first = refreshes[0]
    inverses = zip(*(refresh["made"]["inverses"] for refresh in refreshes), strict=True)
    return {**first, "made": {**first["made"], "inverses": [_merged(each) for each in inverses]}}
