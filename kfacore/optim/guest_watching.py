"""What a guest learns of the forward passes of somebody's loop: watched, observed, averaged in once a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfacore import host
from kfacore.curvature.faults import blaming
from kfacore.curvature.owned import require_divisible
from kfacore.curvature.schedule import FIRST_REFRESHES
from kfacore.errors import ConfigError, DataError
from kfacore.network.outputs import read_output
from kfacore.optim.grafting import Grafting, movable
from kfacore.optim.guest_capture import GuestNetwork, Recording
from kfacore.optim.guest_curvature import GuestCurvature
from kfacore.optim.guest_options import GuestOptions
from kfacore.optim.guest_targets import sampled_targets, vectors_of
from kfacore.optim.joint import Joint
from kfacore.optim.loss import Loss
from kfacore.optim.parts import widest_side
from kfacore.optim.sharded import ShardedGrafting
from kfacore.optim.sharing import Sharing
from kfacore.parallel.ranks import checksum, find_ranks
from kfacore.parallel.shards import require_same_processes
from kfacore.registry import Registry
from kfacore.roles.approx import Approximation
from kfacore.roles.estimator import Estimator

__all__ = ["Watching"]


class Watching(Sharing):
    """An optimizer around another one that takes statistics from the passes of the loop that it is in.

    Args:
        model: The model.
        base: The optimizer inside.
        options: What was chosen.
        parts: The loss, or None, the approximation and the estimator.
        registry: Where layer types come from.
        process_group: See `kfacore.Preconditioned`.

    Attributes:
        steps: Steps that were taken.
        curvature: Statistics and inverse; None before the first pass was observed.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        options: GuestOptions,
        parts: tuple[Loss | Joint | None, Approximation, Estimator],
        registry: Registry,
        process_group: Any,
    ) -> None:
        super().__init__(base)
        self.options = options
        self.loss, self.approx, self.estimator = parts
        self.network = GuestNetwork(
            model,
            registry.layers(),
            options.rest,
            max_dim=widest_side(model, self.approx.config.max_dim),
            reduce=options.reduce,
            listens=self.loss is None,
        )
        self.network.find(self.own())
        device = self.network.layers[0].parameters[0].device
        self.generator = torch.Generator(device).manual_seed(options.seed)
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
        self._said: dict[tuple[str, str], str] = {}

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
            with blaming(self._components, self._doing("watch")), self.network.watching():
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
        with blaming(self._components, self._doing("observe")):
            z = self._outputs_of(z, recording)
            with self.network.undisturbed(z):
                self.network.order(recording, z)
                if targets is None:
                    targets = sampled_targets(self.loss, z.detach(), valid, self.estimator, self.generator, self.ranks)
                vectors, mask, total = vectors_of(
                    self.loss, z, targets, valid, self.estimator, self.generator, self._dtype, self.ranks
                )
                samples = self.network.samples(recording, z, vectors, mask, total)
            self._prepare().add(samples)
        recording.observed = True
        recording.calls = [[] for _ in self.network.layers]  # the graph is the user's again

    def _outputs_of(self, found: Any, recording: Recording) -> Tensor:
        """Z, if it can be observed."""
        assert self.loss is not None
        if isinstance(found, Tensor) and found.is_inference():
            raise ConfigError("observe(z): z was computed in torch.inference_mode(), where no gradients are kept")
        if not isinstance(self.loss, Joint) and self.options.output is None:
            _require_one(found)
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

    def _share_out(self) -> None:
        """Directions for parameters in shards, once there is curvature."""
        if self._inverse is not None and self._grafting is None:
            assert self.curvature is not None
            groups, decoupled = self.curvature.groups, self.options.decoupled
            self._grafting = ShardedGrafting(self.base, self.network.layers, decoupled, groups, self.ranks)

    def _forget(self) -> None:
        """Statistics of blocks that are no longer these."""
        if self.curvature is not None:
            self.curvature.preconditioner.discard()
        self.curvature = self._grafting = None
        self._agreed = self.ranks.alone

    def _components(self) -> Iterator[tuple[str, Any]]:
        """What may be somebody's own, with its slot."""
        losses = self.loss.heads.values() if isinstance(self.loss, Joint) else (self.loss,)
        yield from (("likelihood", loss.likelihood) for loss in losses if loss is not None)
        yield "approx", self.approx
        yield "estimator", self.estimator
        types = {id(user.type): user.type for block in self.network.layers for user in block.users if user.type}
        yield from (("layer", each) for each in types.values())

    def _doing(self, what: str) -> str:
        return f"{what}, step {self.steps + 1}"

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

    def _name_failures(self) -> None:
        """Say which blocks' directions were not finite: at once on the host, else when a step waits anyway."""
        if self.curvature is None or self._grafting is None or self.network.sharded:
            return
        failed = self._grafting.failed
        if not (host.is_free(failed) or self.curvature.waited) or not bool(failed.cpu().numpy().any()):
            return
        makers = self.curvature.preconditioner.joined.makers
        for i in failed.nonzero().flatten().tolist():
            name = self.network.layers[i].info.name
            self._say(
                f"{name}: {makers[i]} made NaN or infinity of a finite gradient in step {self.steps}; the base "
                "optimizer's own step was taken for this block, and will be wherever that happens again. Raise "
                "`damping`, or report it to its author",
                about=name,
            )
        failed.zero_()

    def _say(self, text: str, about: str = "") -> None:
        """What must not pass in silence, once for what it is about, whatever numbers are in it."""
        key = about, "".join(character for character in text if not character.isdigit())
        if key not in self._said:
            self._said[key] = text
            warnings.warn(f"Preconditioned: {text}", UserWarning, stacklevel=4)


def _require_one(found: Any) -> None:
    """Refuse outputs in which two tensors may as well be z.

    Raises:
        ConfigError: There are two of one shape.
    """
    shapes = [z.shape for z in found if isinstance(z, Tensor)] if isinstance(found, list | tuple) else []
    if len(shapes) > 1 and shapes[1] == shapes[0]:
        raise ConfigError(
            f"observe(z): a {type(found).__name__} with {shapes.count(shapes[0])} tensors of shape {tuple(shapes[0])}, "
            "each of which may be z: give one of them, say which with output = a function, or give the likelihood of "
            "several heads"
        )
