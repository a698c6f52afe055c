r"""What turns gradients into preconditioned gradients: moments, factorisation, solve.

It knows no model and no step, so it can serve `kfacore.KFAC` and other training loops alike: feed it what an
estimator saw, refresh it at chosen gammas, and ask for F-hat^-1 v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.curvature.joined import Joined
from kfacore.curvature.pieces import load_pieces
from kfacore.curvature.schedule import FIRST_REFRESHES, scheduled
from kfacore.errors import ConfigError, NumericalError
from kfacore.parallel.background import BackgroundRefresh, Made
from kfacore.parallel.pace import Pace
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.parallel.triangles import folded, unfolded
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments, Tally
from kfacore.roles.samples import Samples, rows_a_case
from kfacore.schema.slots import PiRule

__all__ = ["Preconditioner", "add_up"]

_CHEAP = 2e7
"""Operations, a millisecond or two, below which a refresh costs what its calls cost: no share of anything."""


class Preconditioner:
    """Running statistics and the approximate inverse made of them.

    Args:
        approx: The approximation of the Fisher. Blocks that it does not serve get built-in curvature, see
            `kfacore.curvature.joined`.
        layers: The blocks, in execution order.
        like: A tensor with the parameters' dtype and device.
        decay: Largest weight of the past in the running averages.
        pairs: Pairs (i, j) of blocks for approximations that couple them, a forest; each block and the next if left
            out.
        ranks: The processes that train together. Averages are then sums over them, each process keeps its share, and
            they are added up when an inverse is made; factors are divided among the processes.

    Raises:
        UnsupportedModelError: The approximation refuses the layers.

    Attributes:
        moments: The running averages.
        joined: Who serves which blocks.
        inverse: The inverse in use, or None before the first refresh.
        rows: Rows a case in the last statistics, see `rows_a_case`.
    """

    def __init__(
        self,
        approx: Approximation,
        layers: Sequence[Block],
        like: Tensor,
        decay: float,
        pairs: Sequence[tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.approx = approx
        self.ranks = ranks
        self.layers = list(layers)
        self.decay = decay
        self.joined = Joined(approx, self.layers, pairs)  # moments may be large: this asks first whether all fits
        self.moments = self._start(like)
        self._like = like
        self._whole = True  # the averages are those of all processes, not this one's share
        self._beside = ranks.beside() if approx.config.refresh == "background" else ranks
        self.inverse: Inverse | None = None
        self._background = BackgroundRefresh(like.device)
        self._hurried = self._owed = False
        self._worked = self._refreshed = 0.0
        self.rows = 1.0

    def _start(self, like: Tensor) -> Moments:
        """The averages that are kept here."""
        return self.joined.start(like)

    def spent(self, operations: float) -> None:
        """Told the operations of a step without its refresh, which the share of refreshes is measured against."""
        self._worked += operations

    def update(self, samples: Samples) -> None:
        """Take in what the estimator saw in a mini-batch: `add` and `commit` in one."""
        rows = rows_a_case(samples, self.layers)
        if self.ranks.alone:
            self.rows = rows
            self.moments.update(samples, self.decay)
            return
        if self._whole:  # of what all have alike each keeps a share, so that the shares add up
            torch._foreach_mul_([value for value, _ in self.moments.averages], 1.0 / self.ranks.size)
            self._whole = False
        numbers = [float(x) for tally in self.moments.tallies(samples) for x in tally]
        *total, rows = self.ranks.count("counts", [*numbers, rows])  # all must refresh in the same steps
        self.rows = rows / self.ranks.size
        tallies = [Tally(*pair) for pair in zip(total[::2], total[1::2], strict=True)]
        self.moments.update_share(samples, self.decay, tallies)

    def check(self, samples: Samples) -> None:
        """Refuse what `update` would refuse, before processes wait for each other in it."""
        if not self.ranks.alone:
            self.moments.tallies(samples)

    def gather(self) -> None:
        """Add up the processes' shares of the averages, which all of them then have."""
        if self._whole or self.ranks.alone:
            return
        averages = self.moments.averages
        parts = [folded(value) if symmetric else value for value, symmetric in averages]
        for (value, symmetric), total in zip(averages, self.ranks.sum("statistics", parts), strict=True):
            value.copy_(unfolded(total, value.shape[-1]) if symmetric else total)
        self._whole = True

    def hurry(self) -> None:
        """Refresh in the next step, due or not: the inverse in use has led to a step that was undone."""
        self._hurried = True

    def add(self, samples: Samples) -> None:
        """Take in a part of a mini-batch, a micro-batch for example; averages do not move before `commit`."""
        self.rows = rows_a_case(samples, self.layers)
        self.moments.add(samples)

    def forget(self) -> None:
        """Drop what was added since the last `commit`."""
        self.moments.forget()

    def commit(self) -> None:
        """Average in what was added; all processes together, whether they have added something or not."""
        self.gather()
        add_up(self.moments, self.ranks)
        self.moments.commit(self.decay)
        self._agree_on_rows()

    def _agree_on_rows(self) -> None:
        """Their mean over processes, all of which must refresh in the same steps."""
        if not self.ranks.alone:
            (rows,) = self.ranks.count("rows", [self.rows])
            self.rows = rows / self.ranks.size

    def due(self, step: int) -> bool:
        """Whether the inverse is refreshed in this step: when it is `scheduled`.

        With a share a refresh waits for the first step in which all of them but the first, itself included, are no more
        than this share of the work; one after a step undone does not wait.
        """
        if self.inverse is None or self._hurried:
            return True
        config, cost = self.approx.config, self._background.operations
        share, planned = config.refresh_share, scheduled(step, config.refresh_every, config.refresh_growth)
        if share is None or cost is None or cost < _CHEAP:
            return planned
        self._owed = self._owed or planned
        refreshes = self._refreshed + cost
        return self._owed and refreshes <= share * (self._worked + refreshes)

    def waits(self, step: int, gammas: Sequence[Tensor]) -> bool:
        """Whether `candidates` waits for the device in this step: it refreshes, or takes up a refresh."""
        return self._wanted(step, gammas) or self._background.due == step

    def candidates(
        self, step: int, gammas: Sequence[Tensor], *, pi: PiRule
    ) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice]]:
        """New inverses to compare in this step, if it is time for any; the one in use goes on until `use`.

        A refresh is wanted when it is `due`, and whenever there are several gammas. Inline it happens at once; in
        the background it starts now and is taken up D steps later, or when the next one is wanted, if that is sooner.
        The first steps, which follow each other's refresh, are always inline.

        Returns:
            Pairs of gamma and inverse, none if the inverse in use goes on, and what must be reported.

        Raises:
            NumericalError: All gammas failed and there is no earlier inverse; the message names the layer.
        """
        wanted = self._wanted(step, gammas)
        config = self.approx.config
        if config.refresh == "inline" or self.inverse is None or step <= FIRST_REFRESHES:
            return self.refresh(gammas, pi=pi) if wanted else ([], [])
        self._background.advance()
        found: tuple[Sequence[tuple[Tensor, Inverse]], list[Notice]] = ([], [])
        if self._background.due is not None and (wanted or self._background.due <= step):
            found = self._report(self._background.collect(self._load))
        if wanted:
            self.gather()
            moments = self.moments.frozen()
            delay = config.refresh_delay
            self._background.start(lambda: self._make(moments, gammas, pi, self._beside), step + delay, delay)
            self._owed = False
            self._refreshed += self._background.operations or 0.0
        return found

    def refresh(self, gammas: Sequence[Tensor], *, pi: PiRule) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice]]:
        """New inverses at each gamma, from the statistics as they are now. Does not yet use any: see `use`.

        Returns:
            Pairs of gamma and inverse, and what must be reported. A gamma whose factorisation failed is left out; if
            all failed there is no pair, and the inverse in use stays.

        Raises:
            NumericalError: All failed and there is no earlier inverse; the message names the layer.
        """
        self.gather()
        with Pace() as pace:
            made = self._make(self.moments, gammas, pi, self.ranks)
        self._background.operations = pace.done
        if self.inverse is not None:
            self._refreshed += pace.done
        else:  # not counted: no step is without it, and its curvature is soon out of date
            for _, inverse in made.pairs:  # once, before the first is used
                self._try_out(inverse)
        return self._report(made)

    def _try_out(self, inverse: Inverse) -> None:
        self.joined.try_out(inverse, self._like)

    def examine(self, solved: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        """Name the block where a solution is not what it should be; waits for the device.

        For whoever found a step that is not finite, and for steps that wait anyway.

        Args:
            solved: F-hat^-1 of the gradient, one tensor a block.
            gradient: What was solved for.

        Raises:
            PluginError: The approximation returned another number of tensors, or other shapes or dtypes.
            NumericalError: A block is not finite although its gradient is.
        """
        self.joined.examine(solved, gradient)

    def _wanted(self, step: int, gammas: Sequence[Tensor]) -> bool:
        return self.due(step) or len(gammas) > 1

    def _make(self, moments: Moments, gammas: Sequence[Tensor], pi: PiRule, ranks: Ranks) -> Made:
        """Factorise and damp; touches nothing but its arguments, for it may run on another thread."""
        with ranks.dividing():
            return self._factorised(moments, gammas, pi)

    def _factorised(self, moments: Moments, gammas: Sequence[Tensor], pi: PiRule) -> Made:
        pairs: list[tuple[Tensor, Inverse]] = []
        failure: str | None = None
        try:
            factorisation = self.joined.factorise(moments)
        except NumericalError as error:  # what does not depend on gamma failed: no gamma will do
            return Made([], [], str(error))
        for gamma in gammas:
            try:
                pairs.append((gamma, self.joined.damped(factorisation, gamma, pi)))
            except NumericalError as error:
                failure = str(error)
        return Made(pairs, [notice for _, inverse in pairs for notice in inverse.notices], failure)

    def _report(self, made: Made) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice]]:
        """What must be reported, and what became of a failure."""
        notices = list(made.notices)
        if made.failure is not None:
            if not made.pairs and self.inverse is None:
                raise NumericalError(made.failure)
            if self._restart():  # one mini-batch too large for the dtype: the next one has a say again, at once
                self.hurry()
            layer, _, message = made.failure.partition(": ")
            kept = "the other candidates were used" if made.pairs else "the previous inverse was kept"
            notices.append(Notice(layer, f"{message} ({kept})"))
        return made.pairs, notices

    def _restart(self) -> bool:
        """Forget averages that are not finite; whether there were any."""
        return self.moments.restart()

    def _load(self, state: Any) -> Inverse:
        if "owned" in state:  # of processes that had a part each
            return load_pieces(self.joined, state, range(len(self.layers)))
        return self.joined.load_inverse(state)

    def use(self, inverse: Inverse) -> None:
        """Take up one of the refreshed inverses."""
        self.inverse = inverse
        self._hurried = self._owed = False
        if self.moments.turns:
            self.gather()
        self.moments.refreshed(inverse)

    @property
    def in_use(self) -> Inverse:
        """The inverse in use.

        Raises:
            ConfigError: There has been no refresh yet.
        """
        if self.inverse is None:
            raise ConfigError("the preconditioner has no inverse yet: call update, refresh and use first")
        return self.inverse

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 v with the inverse in use.

        Raises:
            ConfigError: There has been no refresh yet.
        """
        return self.in_use.solve(blocks)

    def solve_into(self, inverse: Inverse, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """F-hat^-1 v with one of the inverses, written over ``out``.

        Raises:
            PluginError: The approximation raised something; names it.
        """
        self.joined.solve_into(inverse, blocks, out)

    def discard(self) -> None:
        """Let go of a refresh under way: nobody will collect it."""
        self._background.load_state_dict(None, self._load)

    def state_dict(self) -> dict[str, Any]:
        """Averages, the inverse in use, and a refresh under way; all processes together."""
        self.gather()
        return {
            "layers": [layer.name for layer in self.layers],
            "moments": self.moments.state_dict(),
            "inverse": None if self.inverse is None else self.inverse.state_dict(),
            "background": self._background.state_dict(),
            "schedule": [self._hurried, self._owed, self._worked, self._refreshed, self._background.operations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of the same approximation and layers."""
        self._load_moments(state["moments"])
        saved = state["inverse"]
        self.inverse = None if saved is None else self._load(saved)
        self._background.load_state_dict(state["background"], self._load)
        schedule = state.get("schedule", (False, False, 0.0, 0.0, None))
        self._hurried, self._owed, self._worked, self._refreshed, self._background.operations = schedule

    def _load_moments(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state)
        self._whole = True


def add_up(moments: Moments, ranks: Ranks, owner: int | None = None) -> None:
    """Sum over processes what was added to moments since their last `Moments.commit`.

    Args:
        moments: Those of each process.
        ranks: The processes.
        owner: Who gets the sums, while the others forget; all if left out.
    """
    if ranks.alone:
        return
    pending, symmetric = moments.pending(), moments.pending_symmetric
    parts = [folded(x) if half else x for x, half in zip(pending, symmetric, strict=True)]
    total = ranks.sum("statistics", parts) if owner is None else ranks.sum_to("statistics", parts, owner)
    if total is None:
        moments.forget()
        return
    whole = [unfolded(x, old.shape[-1]) if half else x for x, old, half in zip(total, pending, symmetric, strict=True)]
    moments.load_pending(whole)
