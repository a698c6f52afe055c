r"""The K-FAC optimizer: one `KFAC.step` is one iteration of method.md, section 2.

Source: Martens & Grosse (2015), Algorithm 2; where the authors' program differs from the paper, the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfacore.curvature.forest import nearest
from kfacore.curvature.joined import Joined
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import ConfigError
from kfacore.network import BlockVector, Linearization, Linearizer
from kfacore.optim.explain import Explanation, explain
from kfacore.optim.guards import as_parameters, require_finite, require_state
from kfacore.optim.joint import BoundJoint, Joint, joint_or_loss
from kfacore.optim.keeper import Keeper
from kfacore.optim.local import LocalModel, combine
from kfacore.optim.loss import BoundLoss, Loss
from kfacore.optim.objective import penalty
from kfacore.optim.options import KFACConfig, complete
from kfacore.optim.phases import At, Trial
from kfacore.optim.quadratic import model_value
from kfacore.optim.statistics import seen
from kfacore.registry import get_registry
from kfacore.roles.approx import Approximation
from kfacore.roles.damping import Damping
from kfacore.roles.estimator import Estimator
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.momentum import Momentum
from kfacore.roles.optimizer import Optimizer, StepReport
from kfacore.roles.samples import Samples, mean_diagonal
from kfacore.roles.trust import Trust
from kfacore.schema.slots import (
    ApproxConfig,
    DampingConfig,
    EstimatorConfig,
    LikelihoodConfig,
    MomentumConfig,
    TrustConfig,
)

__all__ = ["KFAC"]

_OPERATIONS = 10
"""Operations of a step an example and a parameter: six of the gradient, the others of statistics and J v."""

_AFFORDABLE = 1280, 5e4
"""Widest side of which a whole factor is always kept, and parameters' worth of further work that one may cost: a side d
costs about 5 d^3 operations a refresh, a step about 10 an example and a parameter."""


class KFAC(torch.optim.Optimizer, Optimizer):
    r"""K-FAC with exact re-scaling, parameter-free momentum and adaptive damping.

    Each step minimises, on the plane of Delta = -F-hat^-1 grad h and the previous step, the quadratic model
    1/2 delta^T (F + (lambda + eta) I) delta + grad h^T delta with the exact Fisher F, and takes the minimum; the rule
    of trust may undo the step.

    Args:
        model: Any module; outputs z of shape (n, ..., outputs), n examples.
        config: All options in one object; then no other option may be given.
        likelihood: A name, a table, a config object or an instance; likewise the other slots. Also a loss of torch,
            as ``nn.CrossEntropyLoss()``, whose value is compared with ours on the first mini-batch.
        approx: The approximation of the Fisher, ``"blockdiag"`` or ``"tridiag"``, or a plug-in's.
        estimator: The statistics estimator.
        damping: The damping strategy.
        momentum: The momentum rule.
        trust: Whether steps that raise the objective are undone.
        weight_decay: eta >= 0.
        preset: Where slots that are left out come from.
        seed: Seed of the sampled targets.
        autocast: ``"bfloat16"`` for mixed precision: forward and backward passes run under torch's autocast, factors,
            solves and the quadratic model keep the parameters' dtype. Steps that adapt lambda run wholly in it,
            because rho is a small difference of two objectives. An autocast around `step` means the same.
        unsupported: ``"serve"`` takes any model; ``"error"`` refuses what is not a Linear layer that is called once on
            one row an example, and what draws random numbers or mixes examples.
        output: Where z is in what the model returns, a name or a function; ``"logits"`` and the first tensor are found.
        reduce: Names of blocks whose positions are pooled: their rows are summed over an example's positions first.

    Raises:
        ConfigError: An option is wrong.
        UnsupportedModelError: A module cannot be preconditioned; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KFACConfig | None = None,
        *,
        likelihood: str | Mapping[str, Any] | LikelihoodConfig | Likelihood | nn.Module | Loss | Joint | None = None,
        approx: str | Mapping[str, Any] | ApproxConfig | Approximation | None = None,
        estimator: str | Mapping[str, Any] | EstimatorConfig | Estimator | None = None,
        damping: str | Mapping[str, Any] | DampingConfig | Damping | None = None,
        momentum: str | Mapping[str, Any] | MomentumConfig | Momentum | None = None,
        trust: str | Mapping[str, Any] | TrustConfig | Trust | None = None,
        weight_decay: float | None = None,
        preset: str | None = None,
        seed: int | None = None,
        autocast: str | None = None,
        unsupported: str | None = None,
        output: str | Callable[[Any], Tensor] | None = None,
        reduce: Sequence[str] = (),
    ) -> None:
        given = {
            "likelihood": likelihood,
            "approx": approx,
            "estimator": estimator,
            "damping": damping,
            "momentum": momentum,
            "trust": trust,
            "weight_decay": weight_decay,
            "preset": preset,
            "seed": seed,
            "autocast": autocast,
            "unsupported": unsupported,
            "output": output,
            "reduce": reduce or None,
        }
        registry = get_registry()
        chosen = complete(registry, config, {key: value for key, value in given.items() if value is not None})
        eta = chosen["weight_decay"]
        if not (isinstance(eta, int | float) and math.isfinite(eta) and eta >= 0):
            raise ConfigError(f"weight_decay must be a number >= 0, found {eta!r}")
        if not isinstance(chosen["seed"], int) or isinstance(chosen["seed"], bool):
            raise ConfigError(f"seed must be an integer, found {chosen['seed']!r}")
        self._low = torch.bfloat16 if chosen["autocast"] else None
        self.loss = joint_or_loss(chosen["likelihood"])
        self.approx = registry.build("approx", chosen["approx"])
        self.estimator = registry.build("estimator", chosen["estimator"])
        self.damping = registry.build("damping", chosen["damping"])
        self.momentum = registry.build("momentum", chosen["momentum"])
        self.trust = registry.build("trust", chosen["trust"])

        self._model_options = {key: chosen[key] for key in ("unsupported", "output", "reduce")}
        self.linearizer = Linearizer(
            model,
            self.approx.structure,
            layers=registry.layers(),
            max_dim=_widest(model, self.approx.config.max_dim),
            **{**self._model_options, **({"output": self.loss.pack} if isinstance(self.loss, Joint) else {})},
            tangents=self.momentum.uses_model or self.damping.uses_model,
        )
        self.approx.check_layers([x.info for x in self.linearizer.layers if self.approx.serves(x.info)])
        parameters = self.linearizer.parameters
        device = parameters[0].device
        self.generator = torch.Generator(device).manual_seed(chosen["seed"])
        self._eta = float(eta)
        self._size = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
        self.damping.start(self._eta, device)
        self.steps = 0
        self.preconditioner: Preconditioner | None = None
        self._grad: BlockVector | None = None
        self._delta: BlockVector | None = None
        self._proposals: list[BlockVector] = []
        self._spare: list[BlockVector] = []
        self._keeper = Keeper()
        self._predicted = torch.full((), torch.nan, dtype=torch.float64, device=device)
        torch.optim.Optimizer.__init__(self, parameters, {"weight_decay": float(eta)})

    @classmethod
    def for_run(
        cls,
        config: Any,
        *,
        model: nn.Module,
        likelihood: Likelihood,
        parts: Mapping[str, Any],
        weight_decay: float,
        seed: int,
    ) -> KFAC:
        """Build it for `kfac train`."""
        options = {key: getattr(config, key) for key in ("autocast", "unsupported", "output", "reduce")}
        return cls(model, likelihood=likelihood, weight_decay=weight_decay, seed=seed, **options, **parts)

    @property
    def model(self) -> nn.Module:
        """The model being trained."""
        return self.linearizer.model

    @property
    def likelihood(self) -> Likelihood:
        """What the outputs mean."""
        return self.loss.likelihood

    @property
    def weight_decay(self) -> float:
        """eta of the objective."""
        return float(self.param_groups[0]["weight_decay"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the base class: the parameters are those of the model's layers.

        Raises:
            ConfigError: Called by anyone else; parameters that are not in the model could only be ignored.
        """
        if self.param_groups:
            raise ConfigError("KFAC trains the layers of its model; build it again after changing the model")
        super().add_param_group(param_group)

    def step(  # type: ignore[override]  # a step needs its batch
        self, inputs: Any, targets: Tensor, valid: Tensor | None = None
    ) -> StepReport:
        """One iteration: forward, backward, statistics, inverse, quadratic model, update, damping.

        Args:
            inputs: Any nest of tensors whose first dimension is the case; passed to the model as it is.
            targets: One target a case, or a position of a case.
            valid: Which positions count, (n, ...) bool or 0 and 1; all if left out.

        Returns:
            What happened, as scalars on the device.

        Raises:
            UnsupportedModelError: The forward pass cannot be linearised; the message names the module.
            DataError: Inputs and targets do not fit each other or the model, or are not finite.
            NumericalError: The objective or the quadratic model is not finite. Both this and data that is not finite
                are seen in steps that refresh or adapt, the others do not wait for the device; the parameters are
                then what they were before the step.
        """
        device = self.param_groups[0]["params"][0].device.type
        if not torch.is_autocast_enabled(device):
            return self._step(inputs, targets, valid, self._low)
        low = torch.get_autocast_dtype(device)
        if low != torch.bfloat16:
            raise ConfigError(f"KFAC steps under autocast to bfloat16, found {low}: it would need the loss scaled")
        with torch.autocast(device, enabled=False):
            return self._step(inputs, targets, valid, low)

    def _step(self, inputs: Any, targets: Tensor, valid: Tensor | None, low: torch.dtype | None) -> StepReport:
        self._follow_weight_decay()
        at = self._look_back(self._begin(inputs, targets, valid, low), low)
        preconditioner = self._prepare()
        at.waits = at.adapts or at.asks or preconditioner.waits(at.step, self.damping.candidates(at.step))
        if at.waits or self._reads(at.objective):
            self._require_finite("objective", at.objective, at)
        samples = self._samples(at.batch, at.bound)
        preconditioner.update(samples)
        preconditioner.spent(_OPERATIONS * at.batch.cases * self._size)
        if at.step == 1:
            self.damping.observe(mean_diagonal(samples, preconditioner.layers))
        grad = self._gradient(at.batch, at.bound, retain=at.iterations > 1)
        undone = 0
        # Several iterations walk back through the graph, which parameters that were put back have left.
        for attempt in range(self.trust.attempts(at.step) if at.iterations == 1 else 1):
            trial = self._try(at, grad, preconditioner, again=attempt > 0)
            self._take(trial)
            rho, accepted = self._judge(at, trial)
            if not self._undone(at, accepted):
                break
            undone += 1
        self.steps = at.step
        return trial.report(at, rho, accepted, undone)

    def _begin(self, inputs: Any, targets: Tensor, valid: Tensor | None, low: torch.dtype | None) -> At:
        """The forward pass, and the objective before the step."""
        k, m = self.steps + 1, self.linearizer.cases(inputs, targets)
        adapts, asks, iterations = self.damping.adapts(k), self.trust.asks(k), self.momentum.iterations(m)
        pulled = self.momentum.cases(m) if iterations > 1 else 0
        batch = self.linearizer(
            inputs, self.estimator.cases(m), None if adapts or asks or iterations > 1 else low, pulled
        )
        if batch.bare and isinstance(targets, Tensor) and targets.dim() == 1:
            targets = targets.unsqueeze(1)  # one number a case, as the model's outputs
        bound = self.loss.bind(batch.outputs(), targets, valid, step=k)
        loss, objective, error = self._objective(batch, bound)
        return At(k, inputs, targets, valid, batch, bound, loss, objective, error, adapts, asks, iterations)

    def _look_back(self, at: At, low: torch.dtype | None) -> At:
        """Undo the step before if the new mini-batch shows that it did harm; one forward pass where it is in doubt."""
        if not (self.trust.looks_back and self._reads(at.objective)):
            return at
        now = float(at.objective)
        if self._keeper.full and self.trust.doubts(now):
            assert self._delta is not None
            with self._keeper.swapped(self._parameters()):
                earlier = float(self._measure(at))
            if self.trust.disowns(now, earlier):
                self._keeper.restore(self._parameters(), self._delta)
                self._distrust(at.step, self.trust.late)
                at = self._begin(at.inputs, at.targets, at.valid, low)
                said = f"objective {now:.4g} on a new mini-batch, {earlier:.4g} without it"
                at.undone = (f"step {self.steps} was undone: {said}",)
                now = earlier
        self.trust.saw(now)
        return at

    def _try(self, at: At, grad: BlockVector, preconditioner: Preconditioner, *, again: bool) -> Trial:
        """Delta, and how far to go along it and the step before, by the quadratic model of the mini-batch."""
        candidates, notices, refreshed = self._inverses(preconditioner, at.step, again=again)
        proposals = self._propose([inverse for _, inverse in candidates], grad)
        local = self._local(at.batch, at.bound, grad)
        used = self.momentum.uses_model or self.damping.uses_model or at.iterations > 1
        M, b = self._model(local, proposals, used)
        if not again:
            self.damping.confirm(local.change_before() / self._predicted)
        x = self.momentum.coefficients(M, b)
        values = model_value(M, b, x)
        best = 0
        if len(candidates) > 1:
            best = int(torch.where(torch.isnan(values), torch.inf, values).argmin())
        gamma, inverse = candidates[best]
        if refreshed:
            preconditioner.use(inverse)
            self.damping.choose(gamma)
        (alpha, mu), value = x[best], values[best]
        further = None
        if at.iterations > 1:
            further = self._copy_of_delta()
            further.combine(mu, proposals[best], alpha)
            previous = local.J[len(proposals) :].sum(0)  # zero in the first step, which has none
            Jdelta = combine(alpha, local.J[best], mu, previous)
            value = value + local.go_on(further, Jdelta, inverse, self.momentum, at.iterations - 1, self._spare[1:])
        if (at.waits or refreshed) and not self.trust.looks_back:
            self._require_finite("quadratic model", value, at)
        lam = self.damping.lam
        return Trial(proposals[best], inverse, further, alpha, mu, value, used, lam, gamma, refreshed, notices)

    def _judge(self, at: At, trial: Trial) -> tuple[Tensor | None, Tensor]:
        """rho = (h(theta + delta) - h(theta)) / model value where it is wanted, -inf if h went up; and the verdict."""
        rho, accepted = None, torch.isfinite(trial.value)
        if at.adapts or at.asks:
            change = self._measure(at) - at.objective
            rho = torch.where(change > 0, -torch.inf, change / trial.value)
            accepted = accepted & self.trust.accepts(at.objective, change)
            if at.adapts:
                self.damping.adapt(rho)
        self._predicted = trial.value
        return rho, accepted

    def _undone(self, at: At, accepted: Tensor) -> bool:
        """Undo the step unless it was accepted, and say whether the host knows that it was not.

        Where the host would have to wait, the device decides alone.
        """
        if not self.trust.looks_back:
            return False
        assert self._delta is not None
        if not (at.waits or self._reads(accepted)):
            self._keeper.restore(self._parameters(), self._delta, accepted)
            self.damping.strengthen(self.trust.early, ~accepted)
            return False
        kept = bool(accepted)
        self.trust.judged(at.step, kept)
        if not kept:
            self._keeper.restore(self._parameters(), self._delta)
            self._distrust(at.step, self.trust.early)
        return not kept

    def _distrust(self, step: int, factor: float) -> None:
        """After a step was undone: lambda rises, the inverse is made anew, the next steps are asked about."""
        self.damping.strengthen(factor, torch.ones((), dtype=torch.bool, device=self.damping.lam.device))
        self._predicted = torch.full_like(self._predicted, torch.nan)
        self.trust.judged(step, False)
        assert self.preconditioner is not None
        self.preconditioner.hurry()

    def _measure(self, at: At) -> Tensor:
        """h of the mini-batch at the parameters as they are now."""
        with torch.no_grad():
            loss, _ = at.bound.value([at.batch.again()])
        return loss + penalty(self._parameters(), self.weight_decay)

    @staticmethod
    def _reads(value: Tensor) -> bool:
        """Whether reading a number costs no wait."""
        return value.device.type == "cpu"

    def _require_finite(self, what: str, value: Tensor, at: At) -> None:
        damping = self.damping.lam, self.damping.gamma
        deferred = self.loss.deferred
        require_finite(what, value, at.inputs, at.targets, step=at.step, damping=damping, deferred=deferred)

    def _samples(self, batch: Linearization, bound: BoundLoss | BoundJoint) -> Samples:
        """What the estimator's backward passes show of each block, with the S that their squares are divided by."""
        vectors = bound.statistics(batch.statistics_outputs(), self.estimator, self.generator)
        return seen(batch, bound, vectors, self.generator, drawn=self.estimator.draws)

    def _objective(self, batch: Linearization, bound: BoundLoss | BoundJoint) -> tuple[Tensor, Tensor, Tensor]:
        """loss, h = loss + eta/2 ||theta||^2, and the reported error, at the parameters of the forward pass."""
        loss, error = bound.value(batch.outputs())
        return loss, loss + penalty(self._parameters(), self.weight_decay), error

    def _parameters(self) -> list[Tensor]:
        """The parameters in execution order, aligned with the parts of a `BlockVector`, without their graph."""
        return [view for layer in self.linearizer.layers for view in layer.views()]

    def _follow_weight_decay(self) -> None:
        """Tell the damping of an eta that is new in ``param_groups``, which the rest reads in every step."""
        if self.weight_decay != self._eta:
            self._eta = self.weight_decay
            self.damping.follow(self._eta)

    def _vector(self) -> BlockVector:
        return BlockVector.zeros(self.linearizer.layers)

    def explain(self) -> Explanation:
        """What is done with every parameter, and why: its block, who serves it, path, coupling, memory.

        Returns:
            A table to print, whose rows are records. Before the first step it has what modules and sizes tell; a
            model with uninitialised parameters has its blocks after the first step only.
        """
        return explain(self)

    def curvature(self) -> Joined | None:
        """Who serves which blocks; None while the model's parameters are not initialised."""
        if self.preconditioner is not None:
            return self.preconditioner.joined
        infos = [layer.info for layer in self.linearizer.layers]
        return Joined(self.approx, infos, nearest(self.linearizer.following)) if infos else None

    def _prepare(self) -> Preconditioner:
        """The preconditioner, made when the first forward pass has told the order of the layers."""
        if self.preconditioner is None:
            self._size = sum(parameter.numel() for parameter in self.linearizer.parameters)
            layers = self.linearizer.layers
            infos = [layer.info for layer in layers]
            like, decay = layers[0].parameters[0], self.estimator.config.decay
            pairs = nearest(self.linearizer.following)
            self.preconditioner = Preconditioner(self.approx, infos, like, decay, pairs)
            self._grad, self._delta = self._vector(), self._vector()
        return self.preconditioner

    def _gradient(self, batch: Linearization, bound: BoundLoss | BoundJoint, *, retain: bool = False) -> BlockVector:
        """Grad h = mean of J^T (d nll / dz) + eta theta."""
        assert self._grad is not None
        grad = batch.gradient(bound.residuals(batch.outputs()), self._grad, retain=retain)
        torch._foreach_add_(grad.parts, self._parameters(), alpha=self.weight_decay)
        return grad

    def _inverses(
        self, preconditioner: Preconditioner, k: int, *, again: bool
    ) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice], bool]:
        """The inverses to compare in this step, with their gammas: new ones, or the one in use."""
        gammas, pi = self.damping.candidates(k), self.damping.config.pi
        found, notices = preconditioner.refresh(gammas, pi=pi) if again else preconditioner.candidates(k, gammas, pi=pi)
        return found or [(self.damping.gamma, preconditioner.in_use)], notices, bool(found)

    def _propose(self, inverses: list[Inverse], grad: BlockVector) -> list[BlockVector]:
        """Delta = -F-hat^-1 grad for each inverse, in buffers that are kept: fresh memory is dear to touch."""
        self._proposals += [self._vector() for _ in inverses[len(self._proposals) :]]
        proposals = self._proposals[: len(inverses)]
        for inverse, proposal in zip(inverses, proposals, strict=True):
            inverse.solve_into(grad.blocks, proposal.blocks)
            proposal.flat.neg_()
        return proposals

    def _local(self, batch: Linearization, bound: BoundLoss | BoundJoint, grad: BlockVector) -> LocalModel:
        n = batch.model_cases(self.momentum.cases(batch.cases))
        own = self._parameters() if self.momentum.config.slope == "model" and n < batch.cases else None
        return LocalModel(batch, bound, grad, self.damping.lam, self.weight_decay, n, own)

    def _model(self, local: LocalModel, proposals: list[BlockVector], used: bool = True) -> tuple[Tensor, Tensor]:
        """M and b on (Delta, delta_prev) for each candidate; zeros if nothing uses the model."""
        assert self._delta is not None
        if not used:
            empty = self._delta.flat.new_zeros(len(proposals), 2, 2, dtype=torch.float64)
            return empty, empty[:, 0]
        moving = self.momentum.uses_previous and self.steps > 0
        return local.planes([*proposals, self._delta] if moving else proposals, last=moving)

    def _copy_of_delta(self) -> BlockVector:
        """The previous step beside itself: what is made of it may turn out not to be finite."""
        assert self._delta is not None
        self._spare = self._spare or [self._vector() for _ in range(4)]
        self._spare[0].flat.copy_(self._delta.flat)
        return self._spare[0]

    def _take(self, trial: Trial) -> None:
        """theta <- theta + delta, with delta = alpha Delta + mu delta_prev."""
        assert self._delta is not None
        if self.trust.looks_back:
            self._keeper.keep(self._parameters())
        if trial.further is None:
            self._delta.combine(trial.mu, trial.proposal, trial.alpha)
        else:
            self._delta.flat.copy_(trial.further.flat)
        torch._foreach_add_(self._parameters(), self._delta.parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, copied; loads with ``torch.load(weights_only=True)``."""
        state = super().state_dict()
        state["kfac"] = {
            "steps": self.steps,
            "layers": [layer.info.name for layer in self.linearizer.layers],
            "shapes": [list(layer.info.shape) for layer in self.linearizer.layers],
            "approx": self.approx.config.kind,
            "damping": self.damping.state_dict(),
            "generator": self.generator.get_state(),
            "generator_device": self.generator.device.type,
            "seed": self.generator.initial_seed(),
            "preconditioner": None if self.preconditioner is None else self.preconditioner.state_dict(),
            "delta": None if self._delta is None else self._delta.flat.clone(),
            "following": self.linearizer.following,
            "predicted": self._predicted,
            "trust": self.trust.state_dict(),
            "before": self._keeper.state(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; tensors go to the parameters' device, and curvature to their dtype.

        Generators of CPU and GPU draw different numbers. A state of the other kind of device seeds this one's anew,
        from its seed and its step: the run goes on with other sampled targets, the same ones each time.

        Raises:
            ConfigError: The state is of another optimizer or approximation.
            UnsupportedModelError: The state is of a model with other layers.
        """
        own = require_state(state, self.approx.config.kind, {x.info.name: x.info.shape for x in self.linearizer.layers})
        self.linearizer.set_order(own["layers"], final=own["preconditioner"] is not None)
        pairs = own.get("following")
        self.linearizer.following = None if pairs is None else [(int(i), int(j)) for i, j in pairs]
        super().load_state_dict({key: value for key, value in state.items() if key != "kfac"})
        device = self.linearizer.layers[0].parameters[0].device
        self.steps = own["steps"]
        self._follow_weight_decay()
        self.damping.load_state_dict(own["damping"])
        if own.get("generator_device", device.type) == device.type:
            self.generator.set_state(own["generator"].cpu())
        else:
            self.generator.manual_seed(own["seed"] + self.steps)
        self._predicted = own.get("predicted", torch.full((), torch.nan)).to(self._predicted)
        self.trust.load_state_dict(own.get("trust", self.trust.state_dict()))
        self._keeper.load(own.get("before"), self._parameters())
        if self.preconditioner is not None:
            self.preconditioner.discard()
        self.preconditioner = self._grad = self._delta = None
        self._proposals, self._spare = [], []
        if own["preconditioner"] is not None:
            like = self.linearizer.layers[0].parameters[0]
            self._prepare().load_state_dict(as_parameters(own["preconditioner"], own["delta"].dtype, like))
            assert self._delta is not None
            self._delta.flat.copy_(own["delta"])

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy or a pickle is made of: the model, the parts, and the state of `state_dict`.

        So a copy has a model of its own, `model`, unless both are copied together: ``copy.deepcopy((model,
        optimizer))``. As with torch's optimizers, hooks of the step are not copied. It goes on bit for bit.
        """
        parts = {slot: getattr(self, slot) for slot in ("approx", "estimator", "damping", "momentum", "trust")}
        options = {
            "likelihood": self.loss,
            **parts,
            "weight_decay": self.weight_decay,
            "seed": self.generator.initial_seed(),
            "autocast": None if self._low is None else "bfloat16",
            **self._model_options,
        }
        return _copied, (type(self), self.model, options, self.state_dict())


def _copied(kind: type[KFAC], model: nn.Module, options: dict[str, Any], state: dict[str, Any]) -> KFAC:
    """Build a copy anew and let it take up the state."""
    copy = kind(model, **options)
    copy.load_state_dict(state)
    return copy


def _widest(model: nn.Module, limit: int) -> int:
    """Widest side of which a whole factor is kept: `approx.max_dim`, and what the rest of the net is worth.

    A net 4-1500-3 would otherwise spend a hundred times as long on the factors of its wide layer as on its steps.
    """
    always, worth = _AFFORDABLE
    size = sum(p.numel() for p in model.parameters() if p.requires_grad and not is_lazy(p))
    return min(limit, max(always, int((worth * size) ** (1 / 3)))) if size else limit
