r"""K-FAC as a guest in anybody's training loop: directions from curvature, all else from the loop's own optimizer.

Statistics are taken when they are due, from a forward pass that the loop runs anyway; see `Preconditioned`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from kfacore.curvature.faults import blaming
from kfacore.errors import ConfigError
from kfacore.network.outputs import Output
from kfacore.optim.guest_options import GuestOptions
from kfacore.optim.guest_state import joined_state, mark, marked, require_form, split_state, unpack
from kfacore.optim.guest_watching import Watching
from kfacore.optim.joint import Joint, joint_or_loss
from kfacore.optim.loss import Loss
from kfacore.optim.sharded import ShardedGrafting
from kfacore.registry import get_registry

__all__ = ["Preconditioned"]


class Preconditioned(Watching):
    r"""An optimizer whose steps go along K-FAC's directions: a guest in a loop, a trainer, a schedule that exists.

    It shares ``param_groups`` and ``state`` with the optimizer that it is given, so that schedulers, scalers, clipping
    and trainers work as they do with that one. What `step` does is said in `kfacore.optim.grafting`.

    Args:
        model: The model; wrappers for data parallelism and compilation are looked through.
        base: An optimizer of torch's kind with the model's parameters, or some of them.
        likelihood: What the outputs mean, as `kfacore.KFAC` takes it. Without one the user's own backward passes serve
            (the empirical Fisher, of a loss that is a mean), and `observe` is not needed.
        approx: The approximation; by default ``"blockdiag"`` with factors to the power 1/2, which noisy small
            mini-batches want.
        estimator: The statistics estimator, by default ``"monte-carlo"`` on all examples observed.
        every: Steps between two statistics and refreshes; the first three steps always have them.
        scale: ``"graft"``: K-FAC's direction a block, the base's step length. ``"kl"``: gradients are preconditioned
            and shortened to a trust region. ``"none"``: preconditioned.
        rest: ``"base"`` leaves parameters without a Kronecker product (norms, raw ones) to the base, ``"diagonal"``
            preconditions them too.
        damping: c > 0. Each block's gamma is c times its mean scale, see `kfacore.curvature.scales`.
        gamma: One gamma for all blocks instead, in the units of the loss.
        pi: How gamma is split between the two factors of a block.
        kappa: Of ``"kl"``: twice the most that a step may change the model's predictions, in nats.
        decoupled: Whether the base's weight decay is no part of its gradients; by default asked of the base (torch's
            AdamW, Adafactor and Muon, and ``decoupled_weight_decay``), others are taken to add it.
        output: Where z is in what the model returns, for `observe`.
        reduce: Names of blocks whose positions are pooled.
        seed: Of the sampled targets.
        process_group: Processes that train together, with gradients that are averaged over them (by
            DistributedDataParallel, say): their statistics are added up. By default those of torch.distributed where it
            is initialised, False for none.

    Raises:
        ConfigError: An option is wrong, or there is nothing to precondition.
        UnsupportedModelError: Parameters in half precision, or on several devices.

    Example:
        ``opt = Preconditioned(model, torch.optim.AdamW(model.parameters(), lr=3e-4), likelihood="categorical")``, and
        in the loop ``with opt.watch(): z = model(x); opt.observe(z)``.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        likelihood: Any = None,
        approx: Any = None,
        estimator: Any = None,
        every: int = 10,
        scale: Literal["graft", "kl", "none"] = "graft",
        rest: Literal["base", "diagonal"] = "base",
        damping: float = 0.1,
        gamma: float | None = None,
        pi: Literal["layer", "net"] | None = "layer",
        kappa: float = 1e-3,
        decoupled: bool | None = None,
        output: Output = None,
        reduce: Sequence[str] = (),
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if isinstance(base, Preconditioned):
            raise ConfigError("base is a Preconditioned optimizer itself: give it the optimizer inside, base.base")
        options = GuestOptions.of(
            model=model,
            base=base,
            every=every,
            scale=scale,
            rest=rest,
            damping=damping,
            gamma=gamma,
            pi=pi,
            kappa=kappa,
            decoupled=decoupled,
            output=output,
            reduce=tuple(reduce),
            seed=seed,
        )
        registry = get_registry()
        loss: Loss | Joint | None = None if likelihood is None else joint_or_loss(likelihood)
        chosen = options.parts(registry, approx, estimator)
        parts = loss, registry.build("approx", chosen["approx"]), registry.build("estimator", chosen["estimator"])
        super().__init__(model, base, options, parts, registry, process_group)

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base along K-FAC's directions; the base's own where there is no curvature yet.

        Args:
            closure: Runs forward and backward pass, once.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            with torch.no_grad(), blaming(self._components, self._doing("step")):
                self._hear()
                self._refresh()
                self._move()
                self._name_failures()
        finally:
            self.network.release()
        return loss

    def _move(self) -> None:
        """The base's step, along other directions where there is curvature."""
        self._share_out()
        grafting, curvature = self._grafting, self.curvature
        if isinstance(grafting, ShardedGrafting) and self._inverse is not None:
            if self.options.scale == "graft":
                grafting.graft(self._inverse)
            else:
                grafting.replace_rows(self._inverse, self.options.kappa if self.options.scale == "kl" else None)
            self._count()
            return
        if self._inverse is None or grafting is None or curvature is None:
            self.base.step()
            self._count()
            return
        solve = partial(curvature.preconditioner.solve_into, self._inverse)
        if self.options.scale == "graft":
            start = grafting.step()
            self._count()  # of an approximation that raises below, the base's own step is left, whole
            grafting.turn(start, solve)
        else:
            grafting.replace(solve, self.options.kappa if self.options.scale == "kl" else None)
            self._count()

    def _count(self) -> None:
        self.steps += 1
        mark(self.state, [p for p in self.own() if p.grad is not None], self.steps)

    # --- what is told and kept --------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What happens to every parameter, one line each, after a line on where statistics come from."""
        from kfacore.optim.guest_explain import explain

        return explain(self)

    def state_dict(self) -> dict[str, Any]:
        """The base's state with curvature at its parameters, in tensors alone, copied."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = self.own()
        first = [block.parameters[0] for block in self.network.layers]
        state = joined_state(self.base.state_dict(), own, first, self._curvature())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def _curvature(self) -> dict[str, Any]:
        return {
            "approx": self.approx.config.kind,
            "estimated": "own gradients" if self.loss is None else self.estimator.config.kind,
            "network": self.network.state_dict(),
            "steps": self.steps,
            "dtype": str(self._dtype).removeprefix("torch."),
            "generator": self.generator.get_state(),
            "device": self.generator.device.type,
            "curvature": None if self.curvature is None else self.curvature.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state, and go on bit for bit; that of the base optimizer alone begins without curvature.

        Raises:
            ConfigError: The state is of another approximation, or of no optimizer.
            UnsupportedModelError: It is of a model with other blocks.
        """
        require_form(state_dict)
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else dict(changed)
        require_form(given)
        state, ours = split_state(given)
        nest = unpack(ours)
        if nest is not None and "network" not in nest:
            raise ConfigError("the state is of KFAC, which keeps no state of a base optimizer: load it into a KFAC")
        if nest is not None and nest["approx"] != self.approx.config.kind:
            raise ConfigError(
                f"the state is of approx = {nest['approx']!r}, this optimizer has {self.approx.config.kind!r}"
            )
        self.network.release()
        self.network.find(self.own())
        if nest is not None:
            self.network.load_state_dict(nest["network"])
        self._forget()
        self.base.load_state_dict(state)
        if nest is None:
            self._say("the loaded state has no curvature: statistics begin anew")
        else:
            self._take(nest)
            mark(self.state, marked(given, self.own()), self.steps)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _take(self, nest: Mapping[str, Any]) -> None:
        """Take up curvature of these blocks."""
        self.steps = nest["steps"]
        device = self.generator.device.type
        if nest["device"] == device:
            self.generator.set_state(nest["generator"].cpu())
        else:
            self.generator.manual_seed(self.options.seed + self.steps)
        if nest["curvature"] is not None:
            self._prepare().load_state_dict(nest["curvature"], getattr(torch, nest["dtype"]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Model, base, options and state: a copy has a model of its own unless both are copied together."""
        parts: dict[str, Any] = {"likelihood": self.loss, "approx": self.approx, "estimator": self.estimator}
        parts["process_group"] = False if self._group is False else None
        nest = self._curvature()
        return _copied, (type(self), self.network.model, self.base, {**parts, **self.options.chosen}, nest)


def _copied(
    kind: type[Preconditioned],
    model: nn.Module,
    base: torch.optim.Optimizer,
    options: dict[str, Any],
    nest: dict[str, Any],
) -> Preconditioned:
    """Build a copy anew and let it take up the curvature."""
    copy = kind(model, base, **options)
    copy.network.load_state_dict(nest["network"])
    copy._take(nest)
    return copy
