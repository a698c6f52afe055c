r"""The K-FAC optimizer: one `KFAC.step` is one iteration of method.md, section 2.

Source: Martens & Grosse (2015), Algorithm 2; where the authors' program differs from the paper, the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.compiler import uncompiled
from kfacore.curvature.faults import blaming
from kfacore.curvature.joined import Joined
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import ConfigError
from kfacore.network import Linearizer
from kfacore.optim.contract import require_batch, require_model, united
from kfacore.optim.directions import Directions
from kfacore.optim.explain import Explanation, explain
from kfacore.optim.guards import as_parameters, require_state
from kfacore.optim.guest_state import joined_state, mark, own_state, split_state
from kfacore.optim.iteration import Iteration
from kfacore.optim.joint import Joint
from kfacore.optim.loss import Loss
from kfacore.optim.options import KFACConfig, complete
from kfacore.optim.parts import Part, compose
from kfacore.optim.units import Units
from kfacore.parallel.ranks import Ranks, find_ranks
from kfacore.registry import get_registry
from kfacore.roles.approx import Approximation
from kfacore.roles.damping import Damping
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.momentum import Momentum
from kfacore.roles.optimizer import Optimizer, StepReport
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
        lr: What every step is multiplied by, >= 0. The quadratic model has chosen its length: 1 is right for most, and
            a scheduler of torch sets it through ``param_groups``, 0 holding still.
        preset: Where slots that are left out come from.
        seed: Seed of the sampled targets.
        autocast: ``"bfloat16"`` for mixed precision: forward and backward passes run under torch's autocast, factors,
            solves and the quadratic model keep the parameters' dtype. Steps that adapt lambda, or that trust asks
            about, run wholly in it, because rho is a small difference of two objectives. An autocast around `step`
            means the same.
        unsupported: ``"serve"`` takes any model; ``"error"`` refuses what is not a Linear layer that is called once on
            one row an example, and what draws random numbers or mixes examples.
        output: Where z is in what the model returns, a name or a function; ``"logits"`` and the first tensor are found.
        reduce: Names of blocks whose positions are pooled: their rows are summed over an example's positions first.
        process_group: Processes that train together, each with its part of every mini-batch; by default those of
            torch.distributed where it is initialised, False for none. See docs/howto/several-gpus.md.
        fill_grad: Leave the gradient of the loss in ``p.grad`` after each step, for whoever logs it.

    Raises:
        ConfigError: An option is wrong.
        UnsupportedModelError: A module cannot be preconditioned; the message names it.
    """

    _step_supports_amp_scaling = True  # a GradScaler then comes to `step`, where it is told that it is not needed

    linearizer = Part[Linearizer]()
    loss = Part[Loss | Joint]()
    approx = Part[Approximation]()
    estimator = Part[Estimator]()
    damping = Part[Damping]()
    momentum = Part[Momentum]()
    trust = Part[Trust]()
    generator = Part[torch.Generator]()
    ranks = Part[Ranks]()

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
        lr: float | None = None,
        preset: str | None = None,
        seed: int | None = None,
        autocast: str | None = None,
        unsupported: str | None = None,
        output: str | Callable[[Any], Tensor] | None = None,
        reduce: Sequence[str] = (),
        process_group: Any = None,
        fill_grad: bool | None = None,
    ) -> None:
        require_model(model)
        given = {
            "likelihood": likelihood,
            "approx": approx,
            "estimator": estimator,
            "damping": damping,
            "momentum": momentum,
            "trust": trust,
            "weight_decay": weight_decay,
            "lr": lr,
            "preset": preset,
            "seed": seed,
            "autocast": autocast,
            "unsupported": unsupported,
            "output": output,
            "reduce": reduce or None,
            "fill_grad": fill_grad,
        }
        chosen = complete(get_registry(), config, {key: value for key, value in given.items() if value is not None})
        self._build(model, chosen, process_group)

    def _build(self, model: nn.Module, chosen: Mapping[str, Any], process_group: Any) -> None:
        """Make the parts that were chosen, and the groups of torch's part of the optimizer."""
        self._low = torch.bfloat16 if chosen["autocast"] else None
        self._group = process_group
        self._parts = compose(get_registry(), model, chosen, find_ranks(process_group))
        self._model_options = {key: chosen[key] for key in ("unsupported", "output", "reduce")}
        self._eta = float(chosen["weight_decay"])
        self.damping.start(self._eta, self.generator.device)
        self.steps = 0
        self._directions = Directions(self._parts, fill_grad=bool(chosen["fill_grad"]))
        self._iteration = Iteration(self._parts, self._directions)
        defaults = {"lr": float(chosen["lr"]), "weight_decay": self._eta}
        torch.optim.Optimizer.__init__(self, self.linearizer.parameters, defaults)
        mark(self.state, self.linearizer.parameters, 0)

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
    def preconditioner(self) -> Preconditioner | None:
        """Statistics and inverse; None before the first step."""
        return self._directions.preconditioner

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
        uncompiled(torch.optim.Optimizer.add_param_group)(self, param_group)

    def step(  # type: ignore[override]  # a step needs its batch
        self, inputs: Any = None, targets: Any = None, valid: Any = None, *, closure: Any = None
    ) -> StepReport:
        """One iteration: forward, backward, statistics, inverse, quadratic model, update, damping.

        Args:
            inputs: Any nest of tensors whose first dimension is the case; passed to the model as it is. Or, alone, a
                list of micro-batches, ``[(inputs, targets), ...]`` or ``[(inputs, targets, valid), ...]``: the step of
                all of them together, in the memory of one, at the price of further forward passes. Several processes
                give lists, or none of them does.
            targets: One target a case, or a position of a case.
            valid: Which positions count, (n, ...) bool or 0 and 1; all if left out.
            closure: Not taken; there for torch's trainers, which are told what to do.

        Returns:
            What happened, as scalars on the device.

        Raises:
            ConfigError: It was called as another optimizer is; the message says what to write.
            UnsupportedModelError: The forward pass cannot be linearised; the message names the module.
            DataError: Inputs and targets do not fit each other or the model, or are not finite.
            NumericalError: The objective or the quadratic model is not finite. Both this and data that is not finite
                are seen in steps that refresh or adapt, the others do not wait for the device; the parameters are
                then what they were before the step.
        """
        device = self.param_groups[0]["params"][0].device.type
        casts = torch.is_autocast_enabled(device)
        low = torch.get_autocast_dtype(device) if casts else self._low
        with self.ranks.telling(f"step {self.steps + 1}"):
            require_batch(self, inputs, targets, closure)
            if targets is None:
                inputs, targets, valid = united(inputs, self.linearizer.cases)
            if casts and low != torch.bfloat16:
                raise ConfigError(f"KFAC steps under autocast to bfloat16, found {low}: it would need the loss scaled")
        if not casts:
            return self._step(inputs, targets, valid, low)
        with torch.autocast(device, enabled=False):
            return self._step(inputs, targets, valid, low)

    def _step(self, inputs: Any, targets: Any, valid: Any, low: torch.dtype | None) -> StepReport:
        self._follow_model()
        self._follow_weight_decay()
        k, lr = self.steps + 1, float(self.param_groups[0]["lr"])
        with blaming(self._parts.components, f"step {k}"):
            report = self._iteration.run(inputs, targets, valid, step=k, eta=self.weight_decay, lr=lr, low=low)
        self.steps = k
        return report

    def _follow_model(self) -> None:
        """Take everything along where the model was moved, ``model.double()`` or ``model.to(device)``."""
        like, grad = self.linearizer.parameters[0], self._directions.grad
        if self.generator.device == like.device and (grad is None or grad.flat.dtype == like.dtype):
            return
        self.ranks.any("model moved to another device or dtype", flag=False)
        state = self._own_state()
        self.linearizer.moved()
        generator = torch.Generator(like.device).manual_seed(self.generator.initial_seed())
        self._parts.generator = generator
        self._iteration.predicted = self._iteration.predicted.to(like.device)
        self.damping.start(self._eta, like.device)
        self._take_up(state)

    def _follow_weight_decay(self) -> None:
        """Tell the damping of an eta that is new in ``param_groups``, which the rest reads in every step."""
        if self.weight_decay != self._eta:
            self._eta = self.weight_decay
            self.damping.follow(self._eta)

    def explain(self) -> Explanation:
        """What is done with every parameter, and why: its block, who serves it, path, coupling, memory.

        Returns:
            A table to print, whose rows are records. Before the first step it has what modules and sizes tell; a
            model with uninitialised parameters has its blocks after the first step only.
        """
        return explain(self)

    @property
    def units(self) -> Units:
        """What the weights of each block are measured in, see `kfacore.optim.units`."""
        return self._directions.units

    def curvature(self) -> Joined | None:
        """Who serves which blocks; None while the model's parameters are not initialised."""
        return self._directions.curvature()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, copied: tensors at the parameters that they belong to.

        It loads with ``torch.load(weights_only=True)``, and tools that know nothing but tensors under names take it.
        Several processes call it together, since statistics are summed; all get the same, and one may write it.
        """
        self.ranks.any("state_dict", flag=False)
        parameters = self.linearizer.parameters
        mark(self.state, parameters, self.steps)
        first = [layer.parameters[0] for layer in self.linearizer.layers] or parameters[:1]
        return joined_state(uncompiled(torch.optim.Optimizer.state_dict)(self), parameters, first, self._own_state())

    def _own_state(self) -> dict[str, Any]:
        """What torch's part of the state does not have; all processes together."""
        delta = self._directions.delta
        return {
            "steps": self.steps,
            "layers": [layer.info.name for layer in self.linearizer.layers],
            "shapes": [list(layer.info.shape) for layer in self.linearizer.layers],
            "approx": self.approx.config.kind,
            "damping": self.damping.state_dict(),
            "generator": self.generator.get_state(),
            "generator_device": self.generator.device.type,
            "seed": self.generator.initial_seed(),
            "preconditioner": None if self.preconditioner is None else self.preconditioner.state_dict(),
            "delta": None if delta is None else delta.flat.clone(),
            "following": self.linearizer.following,
            "predicted": self._iteration.predicted,
            "rate": self._iteration.rate,
            "units": self.units.values or [1.0] * len(self.linearizer.layers),
            "positions": self._iteration.positions,
            "trust": self.trust.state_dict(),
            "before": self._iteration.keeper.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; tensors go to the parameters' device, and curvature to their dtype.

        Generators of CPU and GPU draw different numbers. A state of the other kind of device seeds this one's anew,
        from its seed and its step: the run goes on with other sampled targets, the same ones each time.

        Raises:
            ConfigError: The state is of another optimizer or approximation.
            UnsupportedModelError: The state is of a model with other layers.
        """
        shapes = {x.info.name: x.info.shape for x in self.linearizer.layers}
        own = require_state(own_state(state_dict), self.approx.config.kind, shapes)
        self.linearizer.set_order(own["layers"], final=own["preconditioner"] is not None)
        self._follow_model()
        torchs, _ = split_state(state_dict)
        torchs = {key: value for key, value in torchs.items() if key != "kfac"}
        uncompiled(torch.optim.Optimizer.load_state_dict)(self, torchs)
        for group in self.param_groups:
            group.setdefault("lr", self.defaults["lr"])  # a state of 0.2 has none
        self._take_up(own)
        mark(self.state, self.linearizer.parameters, self.steps)

    def _take_up(self, own: dict[str, Any]) -> None:
        """Go on from what `_own_state` gave."""
        pairs = own.get("following")
        self.linearizer.following = None if pairs is None else [(int(i), int(j)) for i, j in pairs]
        device = self.linearizer.layers[0].parameters[0].device
        self.steps = own["steps"]
        self._follow_weight_decay()
        self.damping.load_state_dict(own["damping"])
        if own.get("generator_device", device.type) == device.type:
            self.generator.set_state(own["generator"].cpu())
        else:
            self.generator.manual_seed(own["seed"] + self.steps)
        again, directions = self._iteration, self._directions
        again.predicted = own.get("predicted", torch.full((), torch.nan)).to(again.predicted)
        again.rate = float(own.get("rate", 1.0))
        again.positions = own.get("positions")
        self.trust.load_state_dict(own.get("trust", self.trust.state_dict()))
        directions.clear()
        self.units.set(own.get("units"), self.linearizer.layers)
        again.keeper.load(own.get("before"), directions.parameters())
        if own["preconditioner"] is not None:
            like = self.linearizer.layers[0].parameters[0]
            directions.prepare().load_state_dict(as_parameters(own["preconditioner"], own["delta"].dtype, like))
            assert directions.delta is not None
            directions.delta.flat.copy_(own["delta"])

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
            "fill_grad": self._directions.fill_grad,
            "seed": self.generator.initial_seed(),
            "autocast": None if self._low is None else "bfloat16",
            **self._model_options,
            "process_group": False if self._group is False else None,
        }
        return _copied, (type(self), self.model, options, self.state_dict())


def _copied(kind: type[KFAC], model: nn.Module, options: dict[str, Any], state: dict[str, Any]) -> KFAC:
    """Build a copy anew and let it take up the state."""
    copy = kind(model, **options)
    copy.load_state_dict(state)
    return copy
