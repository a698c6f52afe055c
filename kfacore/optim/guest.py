r"""K-FAC as a guest in anybody's training loop: directions from curvature, all else from the loop's own optimizer.

Statistics are taken when they are due, from a forward pass that the loop runs anyway; see `Preconditioned`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacore.curvature.faults import blaming
from kfacore.curvature.owned import require_divisible
from kfacore.curvature.schedule import FIRST_REFRESHES
from kfacore.errors import ConfigError, DataError
from kfacore.network.outputs import Output, read_output
from kfacore.optim.grafting import Grafting, movable
from kfacore.optim.guest_capture import GuestNetwork, Recording
from kfacore.optim.guest_curvature import GuestCurvature
from kfacore.optim.guest_options import GuestOptions
from kfacore.optim.guest_state import joined_state, mark, marked, split_state, unpack
from kfacore.optim.guest_targets import sampled_targets, vectors_of
from kfacore.optim.joint import Joint, joint_or_loss
from kfacore.optim.loss import Loss
from kfacore.optim.sharded import ShardedGrafting
from kfacore.optim.sharing import Sharing
from kfacore.parallel.ranks import checksum, find_ranks
from kfacore.parallel.shards import require_same_processes
from kfacore.registry import get_registry

__all__ = ["Preconditioned"]


class Preconditioned(Sharing):
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
            AdamW and ``decoupled_weight_decay``), others are taken to add it.
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
        self.options = GuestOptions.of(
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
        super().__init__(base)
        registry = get_registry()
        self.loss: Loss | Joint | None = None if likelihood is None else joint_or_loss(likelihood)
        parts = self.options.parts(registry, approx, estimator)
        self.approx = registry.build("approx", parts["approx"])
        self.estimator = registry.build("estimator", parts["estimator"])
        self.network = GuestNetwork(
            model,
            registry.layers(),
            rest,
            max_dim=self.approx.config.max_dim,
            reduce=reduce,
            listens=self.loss is None,
        )
        self.network.find(self.own())
        device = self.network.layers[0].parameters[0].device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ranks = find_ranks(process_group)
        require_divisible(self.approx, sharded=self.network.sharded)
        if self.network.sharded:
            require_same_processes(self.network.layers[0].parameters[0], self.ranks)
        self._group = process_group
        self._agreed = self.ranks.alone
        if self.loss is not None:
            self.loss.shared = not self.ranks.alone
        self.steps = 0
        self.curvature: GuestCurvature | None = None
        self._grafting: Grafting | None = None
        self._idle = False
        self._open = False
        self._outputs: int | None = None
        self._said: list[str] = []

    # --- statistics -------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether statistics are due in the next step."""
        k = self.steps + 1
        return k <= FIRST_REFRESHES or k % self.options.every == 0 or self._inverse is None

    @property
    def _inverse(self) -> Any:
        return None if self.curvature is None else self.curvature.preconditioner.inverse

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run the forward pass in here; it is looked at if statistics are due, else nothing happens.

        Once for each micro-batch of a step.

        Raises:
            ConfigError: It is open already, or the model's outputs cannot have gradients.
        """
        if self._open:
            raise ConfigError("watch() is open already: one `with optimizer.watch():` a forward pass, none inside it")
        if torch.is_inference_mode_enabled():
            raise ConfigError("watch() inside torch.inference_mode(): no gradients are kept there; leave that mode")
        self._hear()
        if self.network.find(self.own()):
            if self.curvature is not None:
                self._say("parameters were unfrozen or added: the blocks were found anew, statistics begin again")
            self._forget()
        self._idle = not (self.due and torch.is_grad_enabled())
        if self._idle:
            self.network.release()
            yield
            return
        self._open = True
        try:
            with self.network.watching():
                yield
        finally:
            self._open = False

    def observe(self, z: Any, targets: Any = None, valid: Any = None) -> None:
        """Take statistics from the outputs of the watched pass; before or after the loss, but before its backward.

        No ``.grad`` is touched and no generator but an own one moves; the graph of z is kept.

        Args:
            z: The outputs, (n, ..., o), with their graph; or what the model returned.
            targets: For estimators and losses that depend on them (``"empirical"``, class weights); else not needed.
            valid: Positions that count, (n, ...), bool or 0 and 1; all if left out.

        Raises:
            ConfigError: There is no such pass, or z is not of it; the message says what to do.
            DataError: z, targets and valid do not fit each other, or nothing counts.
        """
        if self.loss is None:
            raise ConfigError(
                "observe(z) needs to know what z means: Preconditioned(..., likelihood='categorical'); without a "
                "likelihood the statistics are those of your own backward pass, and observe is not called"
            )
        if self._idle:
            return
        recording = self.network.recording
        if recording is None:
            raise ConfigError("observe(z): nothing was watched since the last step; run the model in `with watch():`")
        if recording.observed:
            raise ConfigError("observe was called twice for one watch(): once a forward pass, with its outputs")
        z = self._outputs_of(z, recording)
        self.network.order(recording, z)
        if targets is None:
            targets = sampled_targets(self.loss, z.detach(), valid, self.estimator, self.generator, self.ranks)
        vectors, mask, total = vectors_of(
            self.loss, z, targets, valid, self.estimator, self.generator, self._dtype, self.ranks
        )
        self._prepare().add(self.network.samples(recording, z, vectors, mask, total))
        recording.observed = True
        recording.calls = [[] for _ in self.network.layers]  # the graph is the user's again

    def _outputs_of(self, found: Any, recording: Recording) -> Tensor:
        """Z, if it can be observed."""
        assert self.loss is not None
        if isinstance(found, Tensor) and found.is_inference():
            raise ConfigError("observe(z): z was computed in torch.inference_mode(), where no gradients are kept")
        z: Tensor = read_output(found, self.options.output if not isinstance(found, Tensor) else None)
        if isinstance(self.loss, Joint):
            z = self.loss.pack(found)
        if z.shape[0] == 0:
            raise DataError("observe(z): the mini-batch has no examples")
        self.network.require_observable(z, recording)
        if self._outputs not in (None, z.dim()):
            raise DataError(
                f"observe(z): outputs of shape {tuple(z.shape)}, in earlier steps they had {self._outputs} dimensions; "
                "always give the same outputs of the model"
            )
        self._outputs = z.dim()
        return z

    def _hear(self) -> None:
        """Take up what the user's own backward pass brought."""
        recording = self.network.recording
        if self.loss is not None or recording is None:
            return
        if recording.half and recording.arrived:
            self.network.release()
            raise ConfigError(
                "without a likelihood statistics come from your own gradients, which in float16 carry the scaler's "
                "factor; give likelihood= and call observe(z)"
            )
        samples = self.network.heard(recording)
        if samples is not None:
            self._prepare().add(samples)
        self.network.release()

    def _prepare(self) -> GuestCurvature:
        """What needs the blocks' order."""
        if self.curvature is None:
            decay = self.estimator.config.decay
            self.curvature = GuestCurvature(self.network, self.approx, decay, self.options, self._say, self.ranks)
            if not self.network.sharded:  # those need all processes together: made in the first step
                self._grafting = Grafting(self.base, self.network.layers, self.options.decoupled)
        return self.curvature

    def _forget(self) -> None:
        """Statistics of blocks that are no longer these."""
        if self.curvature is not None:
            self.curvature.preconditioner.discard()
        self.curvature = self._grafting = None
        self._agreed = self.ranks.alone

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
        with torch.no_grad(), blaming(self._components, f"step {self.steps + 1}"):
            self._hear()
            self._refresh()
            if self._inverse is not None and self._grafting is None:
                assert self.curvature is not None
                groups, decoupled = self.curvature.groups, self.options.decoupled
                self._grafting = ShardedGrafting(self.base, self.network.layers, decoupled, groups, self.ranks)
            if self._inverse is None or self._grafting is None:
                self.base.step()
            elif self.options.scale == "graft":
                self._grafting.graft(self._inverse)
            else:
                self._grafting.replace(self._inverse, self.options.kappa if self.options.scale == "kl" else None)
        self.network.release()
        self.steps += 1
        mark(self.state, [p for p in self.own() if p.grad is not None], self.steps)
        return loss

    def _components(self) -> Iterator[tuple[str, Any]]:
        """What may be somebody's own, with its slot."""
        yield "approx", self.approx
        yield "estimator", self.estimator

    def _refresh(self) -> None:
        """Average in what was observed, and a new inverse when it is due."""
        due, added = self.due, self.curvature is not None and self.curvature.added > 0
        if not self.ranks.alone:
            added = due and self.ranks.any(f"step {self.steps + 1}", added)
            if added:
                self._agree()
        if due and not added and self._moves():
            how = "observe(z) was not called" if self.loss is not None else "no pass ran"
            self._say(
                f"statistics were due in step {self.steps + 1} and there were none: {how} in "
                "`with optimizer.watch():`; it goes on with what it has"
            )
        if self.curvature is not None:
            self.curvature.refresh(self.steps + 1, added=added)

    def _agree(self) -> None:
        """All processes have the same blocks, parameters and place among the draws.

        Raises:
            ConfigError: Blocks or parameters differ.
        """
        if not self._agreed:
            states = self.ranks.gather("blocks", self.network.state_dict() if self.network.ordered else None)
            known = next(state for state in states if state is not None)
            if not self.network.ordered:  # nothing was observed here yet
                self.network.load_state_dict(known)
            self._prepare()
            self.ranks.require_same("blocks", self.network.state_dict(), "build the model alike on all processes")
            self._agreed = True
        parameters = [p for block in self.network.layers for p in block.parameters if not self.network.sharded]
        if not self.ranks.alike("parameters", checksum(parameters)):
            raise ConfigError(
                "the parameters differ between processes: gradients are not averaged over them, or the models were not "
                "the same at the start. Wrap the model in DistributedDataParallel, or all-reduce the gradients"
            )
        if not self.ranks.alike("draws", checksum([self.generator.get_state()])):
            self.generator.set_state(self.ranks.gather("draws", self.generator.get_state())[0])

    def _moves(self) -> bool:
        """Whether this is a step of a training: tools make one with rates of 0, to see what the state is like."""
        rates = any(bool(group.get("lr", 1.0) != 0) for group in self.param_groups)
        return rates and any(movable(block) for block in self.network.layers)

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.layers[0].parameters[0].dtype

    def _say(self, text: str) -> None:
        """What must not pass in silence, once, whatever numbers are in it."""
        if not any(_words(text) == _words(said) for said in self._said):
            self._said.append(text)
            warnings.warn(f"Preconditioned: {text}", UserWarning, stacklevel=4)

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
            ConfigError: The state is of another approximation.
            UnsupportedModelError: It is of a model with other blocks.
        """
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else dict(changed)
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


def _words(text: str) -> str:
    return "".join(character for character in text if not character.isdigit())


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
