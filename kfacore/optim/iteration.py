r"""One iteration, phase by phase: begin, look back, try, judge, undo (method.md, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfacore import host
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import NumericalError
from kfacore.network import Accumulated, BlockVector, MicroBatches
from kfacore.optim.directions import Directions
from kfacore.optim.guards import require_finite
from kfacore.optim.keeper import Keeper
from kfacore.optim.local import LocalModel, combine
from kfacore.optim.objective import penalty
from kfacore.optim.parts import Parts
from kfacore.optim.phases import At, Trial
from kfacore.optim.quadratic import model_value
from kfacore.optim.statistics import Statistics
from kfacore.optim.whole_loss import shared
from kfacore.roles.inverse import Notice
from kfacore.roles.optimizer import StepReport

__all__ = ["Iteration"]

_OPERATIONS = 10
"""Operations of a step a row and a parameter: six of the gradient, the others of statistics and J v."""


class Iteration:
    """What one step of `kfacore.KFAC` does, with what is remembered for the next one.

    Args:
        parts: The optimizer's parts.
        directions: Its vectors and curvature.

    Attributes:
        keeper: The parameters before the last step, where the rule of trust looks back.
        predicted: Change of h that the model predicted of the last step, () float64.
        rate: What that step was multiplied by.
        positions: Fewest positions that cases of a mini-batch had so far, on any process; None before the first one.
            ``min_cases`` counts them, and the number of cases is wanted before a mini-batch's outputs are there.
    """

    def __init__(self, parts: Parts, directions: Directions) -> None:
        self._parts, self._directions = parts, directions
        self._statistics = Statistics(parts, directions.units)
        self.keeper = Keeper()
        self.rate = 1.0
        self.positions: int | None = None
        parameters = parts.linearizer.parameters
        self.predicted = torch.full((), torch.nan, dtype=torch.float64, device=parameters[0].device)

    def run(
        self, inputs: Any, targets: Any, valid: Any, *, step: int, eta: float, lr: float, low: torch.dtype | None
    ) -> StepReport:
        """Forward, backward, statistics, inverse, quadratic model, update, damping.

        Args:
            inputs: Of the mini-batch; `MicroBatches` are treated as one.
            targets: Of the mini-batch.
            valid: Positions that count.
            step: Number of the step, k.
            eta: Weight decay.
            lr: What the step is multiplied by: with 1 it goes to the minimum of the model.
            low: Autocast dtype of the forward and backward passes.
        """
        parts, directions = self._parts, self._directions
        directions.begin()
        at = self._look_back(self._begin(inputs, targets, valid, step, eta, lr, low), low)
        preconditioner = directions.prepare()
        self._statistics.measure_inputs(at, preconditioner)
        at.waits = at.adapts or at.asks or preconditioner.waits(step, parts.damping.candidates(step))
        try:
            with parts.ranks.together("backward passes"):
                if at.waits or self._may_read(at.objective):
                    self._require_finite("objective", at.objective, at)
                own = self._statistics.take(at, preconditioner)
                directions.backward(at.batch, at.bound, retain=at.iterations > 1)
        except BaseException:  # here or elsewhere: micro-batches that were added are of no step
            preconditioner.forget()
            raise
        if own is not None:
            self._statistics.add_up(at, preconditioner, *own)
        work = _OPERATIONS * at.whole.cases / parts.ranks.size * directions.size * preconditioner.rows
        preconditioner.spent(work)
        grad = directions.gradient(eta)
        undone = 0
        # Several iterations walk back through the graph, which parameters that were put back have left.
        for attempt in range(parts.trust.attempts(step) if at.iterations == 1 else 1):
            trial = self._try(at, grad, preconditioner, again=attempt > 0)
            self._take(trial)
            self._judge(at, trial)
            if not self._undone(at, trial, grad):
                break
            undone += 1
        self._agree_on_buffers()
        self.positions = at.fewest
        return trial.report(at, undone)

    def _begin(
        self, inputs: Any, targets: Any, valid: Any, k: int, eta: float, lr: float, low: torch.dtype | None
    ) -> At:
        """The forward pass, and the objective before the step."""
        parts, ranks = self._parts, self._parts.ranks
        several = isinstance(inputs, MicroBatches)
        unsure = not ranks.alone and parts.linearizer.unsure(inputs)
        place = f"step {k}" if lr == 1.0 else f"step {k} with lr = {lr}"
        place += f", weight decay {eta}" if eta else ""
        place += ", micro-batches" if several else ""
        whole, look = ranks.whole(
            place, lambda: sum(inputs.sizes) if several else parts.linearizer.cases(inputs, targets), unsure
        )
        m = whole.cases
        adapts, asks, iterations = parts.damping.adapts(k), parts.trust.asks(k), parts.momentum.iterations(m)
        R = self.positions or 1
        sampled, curved = whole.first(parts.estimator.cases(m, R)), whole.first(parts.momentum.cases(m, R))
        linearizer = parts.linearizer
        make = partial(partial(Accumulated, linearizer) if several else linearizer, look=look and not ranks.alone)
        with ranks.together("forward pass"):
            cast = None if adapts or asks or iterations > 1 else low
            batch = make(inputs, sampled, cast, curved if iterations > 1 else 0)
            if batch.bare and isinstance(targets, Tensor) and targets.dim() == 1:
                targets = targets.unsqueeze(1)  # one number a case, as the model's outputs
            bound = parts.loss.bind(batch.outputs(), targets, valid, step=k)
        # Nothing is less than 1: nets without positions ask no other process.
        here = 1 if self.positions == 1 else ranks.least("positions", bound.positions)
        counts = batch.cases, sampled, batch.model_cases(curved)
        own, of_samples, of_model = shared(bound, ranks, whole, counts, k)
        loss, error = ranks.sum("objective", own.value(batch.outputs()))
        objective = loss + penalty(self._directions.parameters(), eta)
        return At(
            step=k,
            eta=eta,
            lr=lr,
            inputs=inputs,
            targets=targets,
            valid=valid,
            batch=batch,
            bound=own,
            loss=loss,
            objective=objective,
            error=error,
            adapts=adapts,
            asks=asks,
            iterations=iterations,
            several=several,
            whole=whole,
            sampled=of_samples,
            curved=of_model,
            positions=R,
            fewest=min(here, self.positions or here),
        )

    def _look_back(self, at: At, low: torch.dtype | None) -> At:
        """Undo the step before if the new mini-batch shows that it did harm; one forward pass where it is in doubt."""
        trust = self._parts.trust
        if not (trust.looks_back and self._may_read(at.objective)):
            return at
        now = at.now
        if self.keeper.full and trust.doubts(now):
            parameters, delta = self._directions.parameters(), self._directions.delta
            assert delta is not None
            with self.keeper.swapped(parameters):
                earlier = float(self._measure(at))
            if trust.disowns(now, earlier):
                self.keeper.restore(parameters, delta)
                self._distrust(at.step, self._parts.damping.caution, trust.late)
                at = self._begin(at.inputs, at.targets, at.valid, at.step, at.eta, at.lr, low)
                said = f"objective {now:.4g} on a new mini-batch, {earlier:.4g} without it"
                at.undone = (f"step {at.step - 1} was undone: {said}",)
                now = earlier
        trust.saw(now)
        return at

    def _try(self, at: At, grad: BlockVector, preconditioner: Preconditioner, *, again: bool) -> Trial:
        """Delta, and how far to go along it and the step before, by the quadratic model of the mini-batch."""
        directions, damping, momentum = self._directions, self._parts.damping, self._parts.momentum
        candidates, notices, refreshed = directions.inverses(preconditioner, at.step, again=again)
        proposals = directions.propose(preconditioner, [inverse for _, inverse in candidates], grad)
        local = directions.local(at, grad)
        used = momentum.uses_model or damping.uses_model or at.iterations > 1
        M, b = self._model(local, proposals, at.step, used)
        if not again:
            damping.confirm(*self._seen_of_before(local))
        x = momentum.coefficients(M, b)
        if at.lr != 1.0 and at.iterations == 1:
            x = at.lr * x
        values = model_value(M, b, x)
        best = 0
        if len(candidates) > 1:
            best = int(torch.where(torch.isnan(values), torch.inf, values).argmin())
        gamma, inverse = candidates[best]
        if refreshed:
            preconditioner.use(inverse)
            damping.choose(gamma)
        (alpha, mu), value = x[best], values[best]
        further = None
        if at.iterations > 1:
            further = directions.copy_of_delta()
            further.combine(mu, proposals[best], alpha)
            previous = local.J[len(proposals) :].sum(0)  # zero in the first step, which has none
            Jdelta = combine(alpha, local.J[best], mu, previous)
            value = value + local.go_on(further, Jdelta, inverse, momentum, at.iterations - 1, directions.spare[1:])
            if at.lr != 1.0:
                value = _scaled(further, value, grad, at.lr)
        waits = at.waits or refreshed
        promised = float(value) if waits or self._may_read(value) else None
        notices = notices + self._examine(at, value, promised, proposals[best], grad, waits=waits, used=used)
        step = proposals[best], inverse, further, alpha, mu, value, used
        return Trial(*step, damping.lam, gamma, refreshed, notices, promised)

    def _seen_of_before(self, local: LocalModel) -> Tensor:  # (2,) float64
        """Slope and curvature that this mini-batch sees along the step before, over what the model predicted of it.

        Of one that was multiplied by a rate, as if it had its whole length l: with s and c along r l of it, the slope
        there is (s + (1/r - 1) c) / r, the curvature c / r^2, and the model, at its minimum at r = 1, predicted the
        change there was over 2 r - r^2.
        """
        before, predicted, r = local.before(), self.predicted, self.rate
        if r == 0.0:
            return torch.full_like(before, torch.nan)
        if r != 1.0:
            s, c = before.unbind()
            before = torch.stack([(s + (1.0 / r - 1.0) * c) / r, c / r**2])
            predicted = predicted / (2.0 * r - r**2 or math.nan)
        return before / predicted.abs()

    def _examine(
        self,
        at: At,
        value: Tensor,
        promised: float | None,
        proposal: BlockVector,
        grad: BlockVector,
        *,
        waits: bool,
        used: bool,
    ) -> list[Notice]:
        """Name who made a step that is not finite. Where trust undoes it, and tries anew, that is only reported."""
        undoes, preconditioner = self._parts.trust.looks_back, self._directions.preconditioner
        finite = True
        if promised is not None:
            finite = math.isfinite(promised) and (used or bool(torch.isfinite(proposal.flat).all()))
        if not finite:
            assert preconditioner is not None
            try:
                preconditioner.examine(proposal.blocks, grad.blocks)
            except NumericalError as error:
                if not undoes:
                    raise
                block, _, message = str(error).partition(": ")
                return [Notice(block, message)]
        if (waits or not finite) and not undoes:
            self._require_finite("quadratic model", value, at)
        return []

    def _model(self, local: LocalModel, proposals: list[BlockVector], step: int, used: bool) -> tuple[Tensor, Tensor]:
        """M and b for each candidate; zeros if nothing uses the model."""
        if not used:
            empty = proposals[0].flat.new_zeros(len(proposals), 2, 2, dtype=torch.float64)
            return empty, empty[:, 0]
        return self._directions.planes(local, proposals, moving=self._parts.momentum.uses_previous and step > 1)

    def _take(self, trial: Trial) -> None:
        """theta <- theta + delta, with delta = alpha Delta + mu delta_prev."""
        parameters, delta = self._directions.parameters(), self._directions.delta
        assert delta is not None
        if self._parts.trust.looks_back:
            self.keeper.keep(parameters)
        if trial.further is None:
            delta.combine(trial.mu, trial.proposal, trial.alpha)
        else:
            delta.flat.copy_(trial.further.flat)
        torch._foreach_add_(parameters, delta.parts)

    def _judge(self, at: At, trial: Trial) -> None:
        """rho = (h(theta + delta) - h(theta)) / model value where it is wanted, -inf if h went up; and the verdict."""
        trial.accepted = torch.isfinite(trial.value)
        if at.adapts or at.asks or self._wonders(at, trial):
            trial.change = change = self._measure(at) - at.objective
            trial.rho = torch.where(change > 0, -torch.inf, change / trial.value)
            trial.accepted = trial.accepted & self._accepts(at, change, trial.value)
            if at.adapts and at.lr:  # a step of length zero tells nothing
                self._parts.damping.adapt(trial.rho)
        self.predicted, self.rate = trial.value, at.lr

    def _accepts(self, at: At, change: Tensor, predicted: Tensor) -> Tensor:  # () bool
        trust = self._parts.trust
        accepted = trust.accepts(at.objective, change)
        if trust.attempts(at.step) == 1:  # where there are several, they go on until h falls
            accepted = accepted & trust.believes(at.objective, change, predicted)
        return accepted

    def _may_read(self, value: Tensor) -> bool:
        """Whether a number of an ordinary step may be read: where that is free, or the rule of trust wants it."""
        return host.is_free(value) or self._parts.trust.every_step

    def _wonders(self, at: At, trial: Trial) -> bool:
        """Whether h after the step is wanted because it promises much."""
        if not trial.used or trial.promised is None or not self._may_read(trial.value):
            return False
        return self._parts.trust.wonders(at.now, trial.promised)

    def _undone(self, at: At, trial: Trial, grad: BlockVector) -> bool:
        """Shorten or undo the step unless it was accepted, and say whether the host knows that it was undone.

        Where the host would have to wait, the device decides alone.
        """
        trust, parameters, delta = self._parts.trust, self._directions.parameters(), self._directions.delta
        if not trust.looks_back:
            return False
        assert delta is not None
        if not (at.waits or self._may_read(trial.accepted)):
            self.keeper.restore(parameters, delta, trial.accepted)
            self._parts.damping.strengthen(trust.early, ~trial.accepted)
            return False
        if trial.kept():
            trust.judged(at.step, True)
            return False
        if self._shortened(at, trial, grad, delta):
            return False
        self.keeper.restore(parameters, delta)
        self._distrust(at.step, self._parts.damping.strengthen, trust.early)
        return True

    def _shortened(self, at: At, trial: Trial, grad: BlockVector, delta: BlockVector) -> bool:
        """Go to the minimum of the parabola through h before the step, its slope there, and h after; if h falls so.

        The share of the step's length is s / (2 (s - c)) with slope s and change c. Such a step's direction was right,
        and lambda, which rises by one over the share, would have turned it too before it had shortened it.
        """
        trust = self._parts.trust
        if trial.change is None or trust.shortest >= 1.0 or trust.attempts(at.step) > 1:  # then lambda is tried
            return False
        slope = torch.dot(grad.flat, delta.flat).double()
        share = float(slope / (2.0 * (slope - trial.change)))
        if not trust.shortest <= share < 1.0:
            return False
        self.keeper.shorten(self._directions.parameters(), delta, share)
        trial.shorten(share)
        change = self._measure(at) - at.objective
        if not bool(self._accepts(at, change, trial.value)):
            return False
        trial.rho, trial.accepted = change / trial.value, torch.ones_like(trial.accepted)
        self._distrust(at.step, self._parts.damping.strengthen, 1.0 / share)
        return True

    def _distrust(self, step: int, strengthen: Callable[[float, Tensor], None], factor: float) -> None:
        """After a step was undone: lambda rises, the inverse is made anew, the next steps are asked about."""
        preconditioner = self._directions.preconditioner
        strengthen(factor, torch.ones((), dtype=torch.bool, device=self.predicted.device))
        self.predicted = torch.full_like(self.predicted, torch.nan)
        self._parts.trust.judged(step, False)
        assert preconditioner is not None
        preconditioner.hurry()

    def _measure(self, at: At) -> Tensor:
        """h of the mini-batch at the parameters as they are now."""
        ranks = self._parts.ranks
        with torch.no_grad(), ranks.together("objective after the step"):
            loss, _ = at.bound.value([at.batch.again()])
        (loss,) = ranks.sum("objective", [loss])
        return loss + penalty(self._directions.parameters(), at.eta)

    def _require_finite(self, what: str, value: Tensor, at: At) -> None:
        damping, deferred = self._parts.damping, self._parts.loss.deferred
        found = damping.lam, damping.gamma
        held = None
        if at.step == 1 and what == "objective":
            model = self._parts.linearizer.model
            held = {name: each.detach() for name, each in (*model.named_parameters(), *model.named_buffers())}
        require_finite(what, value, at.inputs, at.targets, step=at.step, damping=found, deferred=deferred, held=held)

    def _agree_on_buffers(self) -> None:
        """Buffers that a forward pass moves, as running statistics, become the mean over processes."""
        linearizer, ranks = self._parts.linearizer, self._parts.ranks
        if ranks.alone or linearizer.facts is None or not linearizer.facts.keeps:
            return
        for buffer in linearizer.model.buffers():
            if buffer.is_floating_point() and buffer.numel():
                first = buffer.clone()
                ranks.broadcast("buffers", first, 0)
                # What is the same everywhere, infinite entries of a mask too, stays what it is to the last bit.
                away = torch.where(buffer == first, 0.0, buffer - first)
                ranks.sum_into("buffers", away)
                buffer.copy_(first + away / ranks.size)


def _scaled(step: BlockVector, value: Tensor, grad: BlockVector, lr: float) -> Tensor:
    """Shorten a step, and say what the model then comes to: of g + q, its linear and its square term, lr g + lr^2 q."""
    slope = torch.dot(step.flat, grad.flat).double()
    step.flat.mul_(lr)
    return lr * slope + lr**2 * (value - slope)
