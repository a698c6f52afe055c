"""What a guest sees of somebody's model: blocks of the parameters that an optimizer has, and forward passes that it did
not start.

Nothing of the model's is changed but while a pass is watched: then its modules have hooks, and those that hooks cannot
see into run an equal forward that tells of their uses. That one stays until the step, because a backward pass may run
a checkpointed part again and must find the forward that it knows.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfacore.errors import ConfigError, UnsupportedModelError
from kfacore.host import full_precision
from kfacore.network.blocks import ModelBlock, User, with_diagonals
from kfacore.network.capture import Call, Chunk, Recorder, as_written, installed, listening, tells
from kfacore.network.facts import close
from kfacore.network.finding import unwrapped, whole_model
from kfacore.network.pairs import following
from kfacore.network.passes import Pass, gather, send_back
from kfacore.network.pulling import is_reentrant, pulled
from kfacore.network.rows import Counting, all_equal, as_vector, explained
from kfacore.optim.guest_quiet import Quiet
from kfacore.parallel.shards import require_shards
from kfacore.roles.layer import Layer
from kfacore.roles.samples import LayerSamples

__all__ = ["GuestNetwork", "Recording"]

_SCALE = 256.0
"""What output vectors are multiplied by on their way through half precision, a power of two."""

_OUTSIDE = "its weights are used outside its own forward pass, so that its rows do not account for its gradient"


class Recording(Recorder):
    """One watched pass.

    Args:
        blocks: The blocks.
        dtype: That of the parameters.
        listens: Whether gradients are taken from the user's own backward pass.

    Attributes:
        arrived: The gradient by the output of each call, by the call's id.
        observed: Whether its outputs have been observed.
    """

    def __init__(self, blocks: Sequence[ModelBlock], dtype: torch.dtype, *, listens: bool) -> None:
        super().__init__(blocks, None, dtype, checks=False)
        self.arrived: dict[int, Tensor] = {}
        self.observed = False
        self._listens = listens

    def took(self, call: Call, output: Tensor) -> None:
        """Wait for the gradient of the output."""
        if self._listens:
            output.register_hook(partial(self._arrive, call))  # type: ignore[no-untyped-call]  # torch has no types here

    def _arrive(self, call: Call, g: Tensor) -> None:
        before = self.arrived.get(id(call))
        self.arrived[id(call)] = g.detach() if before is None else before + g.detach()

    @property
    def half(self) -> bool:
        """Whether some layer ran in float16, where small gradients vanish."""
        return any(call.s.dtype == torch.float16 for calls in self.calls for call in calls)


class GuestNetwork:
    """A model as a guest sees it.

    Args:
        model: The model.
        types: Layer types, as the registry has them.
        rest: ``"base"`` leaves all but Kronecker products alone; ``"diagonal"`` takes every parameter.
        max_dim: A side of a Kronecker product that is wider is diagonal.
        reduce: Names of blocks whose rows of a case are one.
        listens: Whether gradients are taken from the user's own backward pass.

    Attributes:
        model: The model, without wrappers.
        layers: The blocks; in execution order once a pass has been observed.
        names: Qualified names of the parameters in the blocks.
        ordered: Whether a pass has been observed.
        reduced: Positions of the blocks whose rows of a case are one.
        following: Pairs of blocks that could be coupled.
        notes: What was found out, by a block's name.
        recording: The pass that is watched, or was and is not used up.
        sharded: Whether parameters are spread over processes (FSDP2): in a pass modules have others in their place.
    """

    def __init__(
        self,
        model: nn.Module,
        types: Sequence[Layer],
        rest: Literal["base", "diagonal"],
        *,
        max_dim: int,
        reduce: Sequence[str] = (),
        listens: bool = False,
    ) -> None:
        self.model = unwrapped(model)
        self.layers: list[ModelBlock] = []
        self.names: dict[nn.Parameter, str] = {}
        self.ordered = False
        self.reduced: frozenset[int] = frozenset()
        self.following: list[tuple[int, int]] = []
        self.notes: dict[str, str] = {}
        self.recording: Recording | None = None
        self._types, self._rest, self._max_dim, self._reduce = tuple(types), rest, max_dim, frozenset(reduce)
        self._listens = listens
        self._known: list[nn.Parameter] = []
        self._forwards = ExitStack()
        self._quiet = Quiet()
        self._pooled: set[str] = set()
        self.sharded = False
        self._whole: dict[nn.Parameter, Tensor] = {}

    # --- blocks -----------------------------------------------------------------------------------------------------

    def find(self, own: Sequence[Tensor]) -> bool:
        """Find the blocks if there are trainable parameters that were not there before; whether it did.

        Args:
            own: The parameters that the optimizer has.

        Raises:
            ConfigError: None of them can be preconditioned, or some are not initialised.
            UnsupportedModelError: They are in half precision, or on several devices.
        """
        mine = {id(parameter) for parameter in own}
        now = [p for p in self.model.parameters() if p.requires_grad and id(p) in mine]
        known = {id(parameter) for parameter in self._known}
        if all(id(parameter) in known for parameter in now) and (self.ordered or len(now) == len(known)):
            return False
        if any(is_lazy(parameter) for parameter in self.model.parameters()):
            raise ConfigError("some parameters are not initialised: run the model once before the optimizer watches it")
        self._known, self.ordered, self._pooled, self.notes = now, False, set(), {}
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.sharded = require_shards({self.names[p]: p for p in now})
        found = whole_model(self.model, self._types, self._max_dim) if now else []
        self.layers = [block for block in found if all(id(p) in mine for p in block.parameters) and self._wanted(block)]
        if not self.layers:
            raise ConfigError(
                "there is nothing to precondition: the optimizer's trainable parameters lie in no layer with a "
                "Kronecker product (Linear, convolution, embedding, ...); with rest = 'diagonal' all others are "
                "preconditioned too"
            )
        unknown = sorted(self._reduce - {block.info.name for block in self.layers})
        if unknown:
            blocks = ", ".join(block.info.name for block in self.layers)
            raise ConfigError(f"reduce names {', '.join(unknown)}; the blocks are {blocks}")
        self._reduce_blocks()
        return True

    def _wanted(self, block: ModelBlock) -> bool:
        if self._listens and not block.users:
            return False  # the gradient of a whole mini-batch says nothing of its cases
        return self._rest == "diagonal" or block.info.kind in ("kron", "tied")

    def _reduce_blocks(self) -> None:
        chosen = self._reduce | self._pooled
        self.reduced = frozenset(
            i for i, block in enumerate(self.layers) if block.info.name in chosen and block.info.kind == "kron"
        )

    def state_dict(self) -> dict[str, Any]:
        """What passes have shown of the blocks."""
        return {
            "names": [block.info.name for block in self.layers],
            "shapes": [list(block.info.shape) for block in self.layers],
            "pooled": [self.layers[i].info.name for i in sorted(self.reduced)],
            "following": [list(pair) for pair in self.following],
            "notes": dict(self.notes),
            "ordered": self.ordered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the blocks of a saved state, in its order.

        Raises:
            UnsupportedModelError: The model does not have exactly these blocks.
        """
        names, left = state["names"], state["notes"]
        wanted = set(names)
        broken = {
            i: left.get(block.info.name, _OUTSIDE)
            for i, block in enumerate(self.layers)
            if block.info.name not in wanted and {self.names[p] for p in block.parameters} & wanted
        }
        layers = with_diagonals(self.layers, broken, self.names) if broken else self.layers
        known = {block.info.name: block for block in layers}
        missing = [name for name in names if name not in known]
        more = [name for name in known if name not in wanted and name not in left]
        if missing or more:
            raise UnsupportedModelError(
                f"the saved optimizer state has the blocks {', '.join(names)}; this model has {', '.join(known)}"
            )
        for name, shape in zip(names, state["shapes"], strict=True):
            if tuple(shape) != known[name].info.shape:
                raise UnsupportedModelError(
                    f"{name}: its weight block has shape {known[name].info.shape}, in the saved optimizer state "
                    f"{tuple(shape)}; build the model as it was when the state was saved"
                )
        self.layers = [known[name] for name in names]
        self._pooled, self.notes, self.ordered = set(state["pooled"]), dict(left), bool(state["ordered"])
        self.following = [(int(i), int(j)) for i, j in state["following"]]
        self._reduce_blocks()

    # --- passes -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what the blocks see of the forward passes in here."""
        self.release()
        recording = Recording(self.layers, self.layers[0].parameters[0].dtype, listens=self._listens)
        self.recording = recording
        try:
            with as_written(self.model), self._quiet.forward(), listening(self.layers, recording):
                self._forwards.enter_context(installed(self.layers, recording.emit))
                with self._seeing_whole():
                    yield
        except BaseException:
            self.release()
            raise
        finally:
            recording.closed = True
            if not any(tells(user) for block in self.layers for user in block.users):
                self._forwards.close()

    @contextmanager
    def _seeing_whole(self) -> Iterator[None]:
        """Remember what modules have in place of sharded parameters, if the pass is the first, which is looked at."""
        self._whole = {}
        if not self.sharded or self.ordered:
            yield
            return

        def look(user: User, module: nn.Module, _: Any) -> None:
            self._whole |= {parameter: module.get_parameter(key) for key, parameter in user.local}

        users = [user for block in self.layers for user in block.users]
        handles = [user.module.register_forward_pre_hook(partial(look, user)) for user in users]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def undisturbed(self, z: Tensor) -> AbstractContextManager[None]:
        """Backward passes from z that nothing of the user's notices."""
        return self._quiet.passes(self.model, z)

    def release(self) -> None:
        """Let go of the pass: its graph, and forwards that stand in for modules' own."""
        if self.recording is not None:
            self.recording.closed = True
        self.recording = None
        self._forwards.close()

    def order(self, recording: Recording, z: Tensor | None) -> None:
        """Blocks by first execution, as the first pass has it, and what its outputs z show of them."""
        recording.closed = True
        if self.ordered:
            return
        chunk = Chunk(torch.empty(0) if z is None else z, recording.calls, recording.order)
        outside, pooled = (set[int](), set[int]()) if z is None else self._look(chunk, z)
        calls = {block.info.name: own for block, own in zip(self.layers, recording.calls, strict=True)}
        ordered = [self.layers[i].info.name for i in recording.order]
        self._pooled = {self.layers[i].info.name for i in pooled}
        if outside:
            self.notes |= {self.layers[i].info.name: _OUTSIDE for i in outside}
            layers = with_diagonals(self.layers, dict.fromkeys(outside, _OUTSIDE), self.names)
            self.layers = [block for block in layers if self._wanted(block)]
        known = {block.info.name: block for block in self.layers}
        names = [name for name in ordered if name in known]
        names += [name for name in known if name not in names]
        self.layers = [known[name] for name in names]
        recording.calls = [calls.get(name, []) for name in names]
        self._reduce_blocks()
        self.following = following(self.layers, Chunk(chunk.z, recording.calls), self.reduced)
        self.ordered = True

    @full_precision()
    def _look(self, chunk: Chunk, z: Tensor) -> tuple[set[int], set[int]]:
        """Blocks whose rows do not account for their gradient, and those whose rows of a case all get one g."""
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z.device, z.dtype)
        parameters = list({id(p): p for block in self.layers for p in block.parameters if p.requires_grad}.values())
        roots: list[Any] = [
            *(self._whole.get(p, p) for p in parameters),
            *(call.edge for calls in chunk.calls for call in calls),
        ]
        found = self._backward(lambda: pulled(z, roots, v, retain=True))
        whole = dict(zip(parameters, found, strict=False))
        self._whole = {}
        arrived = iter(found[len(parameters) :])
        outside, pooled = set(), set()
        for i, (block, calls) in enumerate(zip(self.layers, chunk.calls, strict=True)):
            own = [next(arrived) for _ in calls]
            if not block.users:
                continue
            wanted, told = as_vector(_gradients(block, whole)), as_vector(explained(block, calls, own))
            low = calls[0].s.dtype if calls else wanted.dtype  # rounding is that of the pass
            if not close(told.to(low), wanted.to(low), loose=True):
                outside.add(i)
            elif block.info.kind == "kron" and all_equal(calls, own, z.shape[0]):
                pooled.add(i)
        return outside, pooled

    def _backward(self, run: Any) -> Any:
        """Run a backward pass and say what is wrong where torch's message does not.

        Raises:
            ConfigError: The graph is freed.
        """
        try:
            return run()
        except RuntimeError as error:
            if "second time" in str(error):
                raise ConfigError(
                    "observe(z): the graph of z has been freed by a backward pass; call observe before loss.backward()"
                ) from error
            raise

    def samples(
        self,
        recording: Recording,
        z: Tensor,
        vectors: Tensor,  # (k, n, ..., o)
        valid: Tensor | None,
        total: float | Tensor,
    ) -> list[LayerSamples | None]:
        """Send vectors back from observed outputs, and return what each block saw.

        Raises:
            ConfigError: The graph is freed, or z does not depend on any layer of the watched pass.
        """
        chunk = Chunk(z, recording.calls, recording.order)
        scale = _SCALE if recording.half or z.dtype == torch.float16 else 1.0
        passes = self._backward(lambda: send_back(self.layers, chunk, vectors, scale))
        mask = None if valid is None else valid.reshape(valid.shape[0], -1)
        n = z.shape[0]
        return gather(self.layers, *_reached(chunk.calls, passes), Counting(n, n, mask, total), self.reduced)

    def heard(self, recording: Recording) -> list[LayerSamples | None] | None:
        """What each block saw in the user's own backward pass, of a mean over the rows of the last block; or None."""
        if not recording.arrived:
            return None
        self.order(recording, None)
        gs = Pass([[recording.arrived.get(id(call)) for call in calls] for calls in recording.calls], [])
        calls, passes = _reached(recording.calls, [gs])
        last = max((own[-1] for own in calls if own), key=lambda call: call.edge.node._sequence_nr())
        S = float(last.s.shape[:-1].numel())
        passes = [Pass([[None if g is None else g.to(last.dtype) * S for g in own] for own in passes[0].calls], [])]
        n = last.s.shape[0]
        return gather(self.layers, calls, passes, Counting(n, n, None, S), self.reduced)

    @staticmethod
    def require_observable(z: Tensor, recording: Recording) -> None:
        """Refuse outputs that do not come from the watched pass, or have no graph.

        Raises:
            ConfigError: They do not, or a part of the model is checkpointed in a form without such gradients.
        """
        if not z.requires_grad:
            raise ConfigError(
                "observe(z): z has no graph; it was computed under no_grad, or detached, or only frozen parameters are "
                "before it"
            )
        if not any(recording.calls):
            raise ConfigError(
                "observe(z): no layer of the optimizer's model ran while it was watched; is z of another model?"
            )
        if is_reentrant(z):
            raise ConfigError(
                "observe(z): a part of the model is checkpointed by a reentrant function that is not torch's, which "
                "gives no gradients by outputs of layers; use torch.utils.checkpoint.checkpoint"
            )
        nodes = {call.edge.node for calls in recording.calls for call in calls}
        stack, seen = [z.grad_fn], set()
        while stack:
            node = stack.pop()
            if node in nodes:
                return
            if node is not None and node not in seen:
                seen.add(node)
                stack += [before for before, _ in node.next_functions]
        raise ConfigError(
            "observe(z): z does not come from a layer that ran while it was watched; it is of another model, or of a "
            "pass outside `with optimizer.watch():`"
        )


def _gradients(block: ModelBlock, whole: Mapping[nn.Parameter, Tensor | None]) -> list[Tensor]:
    def of(parameter: nn.Parameter) -> Tensor:
        g = whole.get(parameter)
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device) if g is None else g

    return block.view(of)


def _reached(calls: Sequence[list[Call]], passes: Sequence[Pass]) -> tuple[list[list[Call]], list[Pass]]:
    """Without calls that no gradient reached: what was run besides, whose rows are none of the objective's."""
    keep = [
        [j for j in range(len(own)) if any(one.calls[i][j] is not None for one in passes)]
        for i, own in enumerate(calls)
    ]
    kept = [[own[j] for j in which] for own, which in zip(calls, keep, strict=True)]
    return kept, [
        Pass([[own[j] for j in which] for own, which in zip(one.calls, keep, strict=True)], one.loose) for one in passes
    ]
