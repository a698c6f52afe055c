r"""The K-FAC optimizer: one `KFAC.step` is one iteration of method.md, section 2.

Source: Martens & Grosse (2015), Algorithm 2; where the authors' program differs from the paper, the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import ConfigError
from kfacore.nest import map_nest
from kfacore.network import BlockVector, Linearization, Linearizer
from kfacore.optim.guards import check_form, require_finite, require_state
from kfacore.optim.local import LocalModel, combine
from kfacore.optim.objective import mean_losses, penalty
from kfacore.optim.options import KFACConfig, complete
from kfacore.optim.quadratic import model_value
from kfacore.registry import get_registry
from kfacore.roles.approx import Approximation
from kfacore.roles.damping import Damping
from kfacore.roles.estimator import Estimator
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.momentum import Momentum
from kfacore.roles.optimizer import Optimizer, StepReport
from kfacore.roles.samples import mean_diagonal
from kfacore.schema.slots import ApproxConfig, DampingConfig, EstimatorConfig, LikelihoodConfig, MomentumConfig

__all__ = ["KFAC"]


class KFAC(torch.optim.Optimizer, Optimizer):
    r"""K-FAC with exact re-scaling, parameter-free momentum and adaptive damping.

    Each step minimises, on the plane of Delta = -F-hat^-1 grad h and the previous step, the quadratic model
    1/2 delta^T (F + (lambda + eta) I) delta + grad h^T delta with the exact Fisher F, and always takes the minimum.

    Args:
        model: Any module whose trainable parameters lie in supported layers; outputs z of shape (cases, outputs).
        config: All options in one object; then no other option may be given.
        likelihood: A name, a table, a config object or an instance; likewise the other slots.
        approx: The approximation of the Fisher, ``"blockdiag"`` or ``"tridiag"``, or a plug-in's.
        estimator: The statistics estimator.
        damping: The damping strategy.
        momentum: The momentum rule.
        weight_decay: eta >= 0.
        preset: Where slots that are left out come from.
        seed: Seed of the sampled targets.
        autocast: ``"bfloat16"`` for mixed precision: forward and backward passes run under torch's autocast, factors,
            solves and the quadratic model keep the parameters' dtype. Steps that adapt lambda run wholly in it,
            because rho is a small difference of two objectives. An autocast around `step` means the same.

    Raises:
        ConfigError: An option is wrong.
        UnsupportedModelError: A module cannot be preconditioned; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KFACConfig | None = None,
        *,
        likelihood: str | Mapping[str, Any] | LikelihoodConfig | Likelihood | None = None,
        approx: str | Mapping[str, Any] | ApproxConfig | Approximation | None = None,
        estimator: str | Mapping[str, Any] | EstimatorConfig | Estimator | None = None,
        damping: str | Mapping[str, Any] | DampingConfig | Damping | None = None,
        momentum: str | Mapping[str, Any] | MomentumConfig | Momentum | None = None,
        weight_decay: float | None = None,
        preset: str | None = None,
        seed: int | None = None,
        autocast: str | None = None,
    ) -> None:
        given = {
            "likelihood": likelihood,
            "approx": approx,
            "estimator": estimator,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "preset": preset,
            "seed": seed,
            "autocast": autocast,
        }
        registry = get_registry()
        chosen = complete(registry, config, {key: value for key, value in given.items() if value is not None})
        eta = chosen["weight_decay"]
        if not (isinstance(eta, int | float) and math.isfinite(eta) and eta >= 0):
            raise ConfigError(f"weight_decay must be a number >= 0, found {eta!r}")
        if not isinstance(chosen["seed"], int) or isinstance(chosen["seed"], bool):
            raise ConfigError(f"seed must be an integer, found {chosen['seed']!r}")
        if chosen["autocast"] not in (None, "bfloat16"):
            raise ConfigError(f"autocast must be 'bfloat16' or left out, found {chosen['autocast']!r}")
        self._low = torch.bfloat16 if chosen["autocast"] else None
        self.likelihood = registry.build("likelihood", chosen["likelihood"])
        self.approx = registry.build("approx", chosen["approx"])
        self.estimator = registry.build("estimator", chosen["estimator"])
        self.damping = registry.build("damping", chosen["damping"])
        self.momentum = registry.build("momentum", chosen["momentum"])

        self.linearizer = Linearizer(model, self.approx.structure, layers=registry.layers())
        self.approx.check_layers([layer.info for layer in self.linearizer.layers])
        parameters = self.linearizer.parameters
        device = parameters[0].device
        self.generator = torch.Generator(device).manual_seed(chosen["seed"])
        self._eta = float(eta)
        self.damping.start(self._eta, device)
        self.steps = 0
        self.preconditioner: Preconditioner | None = None
        self._targets_like: tuple[torch.Size, torch.dtype] | None = None
        self._grad: BlockVector | None = None
        self._delta: BlockVector | None = None
        self._proposals: list[BlockVector] = []
        self._spare: list[BlockVector] = []
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
        autocast = config.autocast
        return cls(model, likelihood=likelihood, weight_decay=weight_decay, seed=seed, autocast=autocast, **parts)

    @property
    def model(self) -> nn.Module:
        """The model being trained."""
        return self.linearizer.model

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

    def step(self, inputs: Any, targets: Tensor) -> StepReport:  # type: ignore[override]  # a step needs its batch
        """One iteration: forward, backward, statistics, inverse, quadratic model, update, damping.

        Args:
            inputs: Any nest of tensors whose first dimension is the case; passed to the model as it is.
            targets: One target a case.

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
            return self._step(inputs, targets, self._low)
        low = torch.get_autocast_dtype(device)
        if low != torch.bfloat16:
            raise ConfigError(f"KFAC steps under autocast to bfloat16, found {low}: it would need the loss scaled")
        with torch.autocast(device, enabled=False):
            return self._step(inputs, targets, low)

    def _step(self, inputs: Any, targets: Tensor, low: torch.dtype | None) -> StepReport:
        k = self.steps + 1
        m = self.linearizer.cases(inputs, targets)
        self._follow_weight_decay()
        adapts = self.damping.adapts(k)
        steps = self.momentum.iterations(m)
        pulled = self.momentum.cases(m) if steps > 1 else 0
        batch = self.linearizer(inputs, self.estimator.cases(m), None if adapts or steps > 1 else low, pulled)
        targets = self._check_targets(targets, m, batch.statistics_outputs())
        loss, objective, error = self._objective(batch, targets)

        preconditioner = self._prepare()
        gammas = self.damping.candidates(k)
        if adapts or preconditioner.waits(k, gammas):  # this step waits for the device anyway
            self._require_finite("objective", objective, inputs, targets)
        samples = batch.samples(self.estimator, targets, self.likelihood, self.generator)
        preconditioner.update(samples)
        if k == 1:
            self.damping.observe(mean_diagonal(samples))
            gammas = self.damping.candidates(k)
        grad = self._gradient(batch, targets, retain=steps > 1)

        candidates, notices, refreshed = self._inverses(preconditioner, gammas, k)
        proposals = self._propose([inverse for _, inverse in candidates], grad)
        local = self._local(batch, grad)
        used = self.momentum.uses_model or self.damping.uses_model or steps > 1
        M, b = self._model(local, proposals, used)
        x = self.momentum.coefficients(M, b)
        values = model_value(M, b, x)

        best = 0
        if len(candidates) > 1:
            best = int(torch.where(torch.isnan(values), torch.inf, values).argmin())
        gamma, inverse = candidates[best]
        if refreshed:
            preconditioner.use(inverse)
            self.damping.choose(gamma)
        lam, (alpha, mu), value = self.damping.lam, x[best], values[best]
        further = None
        if steps > 1:
            further = self._copy_of_delta()
            further.combine(mu, proposals[best], alpha)
            previous = local.J[len(proposals) :].sum(0)  # zero in the first step, which has none
            Jdelta = combine(alpha, local.J[best], mu, previous)
            value = value + local.go_on(further, Jdelta, inverse, self.momentum, steps - 1, self._spare[1:])
        if adapts or refreshed:
            self._require_finite("quadratic model", value, inputs, targets)
        self._take(further, proposals[best], alpha, mu)

        self.steps = k
        rho = self._adapt(batch, targets, objective, value) if adapts else None
        return StepReport(
            step=k,
            batch_size=m,
            loss=loss,
            objective=objective,
            error=error,
            model_value=value if used else None,
            rho=rho,
            lam=lam,
            gamma=gamma,
            alpha=alpha,
            mu=mu,
            refreshed=refreshed,
            notices=tuple(str(notice) for notice in notices),
        )

    def _check_targets(self, targets: Tensor, cases: int, z: Tensor) -> Tensor:
        """Wholly for the first mini-batch; later only what the host knows without asking the device.

        Returns:
            The targets, floating-point ones in the outputs' dtype.
        """
        check_form(targets, cases, z.device)
        like = targets.shape[1:], targets.dtype
        if like != self._targets_like:
            self.likelihood.check_targets(targets, z.shape[1], "targets")
            self._targets_like = like
        return targets.to(z.dtype) if targets.is_floating_point() else targets

    def _require_finite(self, what: str, value: Tensor, inputs: Any, targets: Tensor) -> None:
        damping = self.damping.lam, self.damping.gamma
        require_finite(what, value, inputs, targets, step=self.steps + 1, damping=damping)

    def _objective(self, batch: Linearization, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, h = loss + eta/2 ||theta||^2, and the reported error, at the parameters of the forward pass."""
        loss, error = mean_losses(self.likelihood, batch.outputs(), targets)
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

    def _prepare(self) -> Preconditioner:
        """The preconditioner, made when the first forward pass has told the order of the layers."""
        if self.preconditioner is None:
            layers = self.linearizer.layers
            infos = [layer.info for layer in layers]
            self.preconditioner = Preconditioner(
                self.approx, infos, layers[0].parameters[0], self.estimator.config.decay
            )
            self._grad, self._delta = self._vector(), self._vector()
        return self.preconditioner

    def _gradient(self, batch: Linearization, targets: Tensor, *, retain: bool = False) -> BlockVector:
        """Grad h = mean of J^T (d nll / dz) + eta theta."""
        assert self._grad is not None
        outputs = batch.outputs()
        parts = torch.split(targets, [len(z) for z in outputs])
        vectors = [self.likelihood.residual(z, y) / batch.cases for z, y in zip(outputs, parts, strict=True)]
        grad = batch.gradient(vectors, self._grad, retain=retain)
        torch._foreach_add_(grad.parts, self._parameters(), alpha=self.weight_decay)
        return grad

    def _inverses(
        self, preconditioner: Preconditioner, gammas: list[Tensor], k: int
    ) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice], bool]:
        """The inverses to compare in this step, with their gammas: new ones, or the one in use."""
        found, notices = preconditioner.candidates(k, gammas, pi=self.damping.config.pi)
        return found or [(self.damping.gamma, preconditioner.in_use)], notices, bool(found)

    def _propose(self, inverses: list[Inverse], grad: BlockVector) -> list[BlockVector]:
        """Delta = -F-hat^-1 grad for each inverse, in buffers that are kept: fresh memory is dear to touch."""
        self._proposals += [self._vector() for _ in inverses[len(self._proposals) :]]
        proposals = self._proposals[: len(inverses)]
        for inverse, proposal in zip(inverses, proposals, strict=True):
            inverse.solve_into(grad.blocks, proposal.blocks)
            proposal.flat.neg_()
        return proposals

    def _local(self, batch: Linearization, grad: BlockVector) -> LocalModel:
        n = batch.model_cases(self.momentum.cases(batch.cases))
        return LocalModel(batch, self.likelihood, grad, self.damping.lam + self.weight_decay, n)

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

    def _take(self, further: BlockVector | None, proposal: BlockVector, alpha: Tensor, mu: Tensor) -> None:
        """Theta <- theta + delta. Always: the method has no rejection."""
        assert self._delta is not None
        if further is None:
            self._delta.combine(mu, proposal, alpha)
        else:
            self._delta.flat.copy_(further.flat)
        torch._foreach_add_(self._parameters(), self._delta.parts)

    def _adapt(self, batch: Linearization, targets: Tensor, before: Tensor, predicted: Tensor) -> Tensor:
        """rho = (h(theta + delta) - h(theta)) / model value on the same mini-batch; -inf if h went up."""
        with torch.no_grad():
            loss, _ = mean_losses(self.likelihood, [batch.again()], targets)
        change = loss + penalty(self._parameters(), self.weight_decay) - before
        rho = torch.where(change > 0, -torch.inf, change / predicted)
        self.damping.adapt(rho)
        return rho

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
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; tensors go to the parameters' device and keep their dtype.

        Generators of CPU and GPU draw different numbers. A state of the other kind of device seeds this one's anew,
        from its seed and its step: the run goes on with other sampled targets, the same ones each time.

        Raises:
            ConfigError: The state is of another optimizer or approximation.
            UnsupportedModelError: The state is of a model with other layers.
        """
        own = require_state(state, self.approx.config.kind, {x.info.name: x.info.shape for x in self.linearizer.layers})
        self.linearizer.set_order(own["layers"])
        super().load_state_dict({key: value for key, value in state.items() if key != "kfac"})
        device = self.linearizer.layers[0].parameters[0].device
        self.steps = own["steps"]
        self._follow_weight_decay()
        self.damping.load_state_dict(own["damping"])
        if own.get("generator_device", device.type) == device.type:
            self.generator.set_state(own["generator"].cpu())
        else:
            self.generator.manual_seed(own["seed"] + self.steps)
        if self.preconditioner is not None:
            self.preconditioner.discard()
        self.preconditioner = self._grad = self._delta = None
        self._proposals, self._spare = [], []
        if own["preconditioner"] is not None:
            moved = map_nest(lambda tensor: tensor.to(device), own["preconditioner"])
            self._prepare().load_state_dict(moved)
            assert self._delta is not None
            self._delta.flat.copy_(own["delta"])
