"""One forward pass with what its blocks saw: uses of weights, each with the edge where its output gradient arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import checkpoint

from kfacore.network import linear
from kfacore.network.blocks import ModelBlock, User
from kfacore.network.outputs import Output, find_output
from kfacore.roles.layer import Emit, Use

__all__ = [
    "Call",
    "Chunk",
    "Recorder",
    "as_written",
    "autocast",
    "capture",
    "first_argument",
    "installed",
    "listening",
    "silenced",
    "tells",
]


@dataclass
class Call:
    """One use of a block in a forward pass.

    Attributes:
        block: The block.
        user: The module that used it.
        use: What its layer type told; without the output.
        s: The output, detached.
        edge: Where g arrives.
        version: The output's, to see whether it was overwritten since.
        dtype: That of the parameters.
        axis: Which dimension of inputs and output has the cases: the first, the second, or none.
    """

    block: ModelBlock
    user: User
    use: Use
    s: Tensor
    edge: GradientEdge
    version: int
    dtype: torch.dtype
    axis: int | None = 0

    @property
    def x(self) -> Tensor:
        """What went in."""
        return self.use.inputs

    @property
    def fast(self) -> bool:
        """Whether the fast path can take it: a Linear with weights of its own and one row a case."""
        return self.block.fast and self.x.dim() == 2

    @cached_property
    def rows(self) -> Tensor:
        """abar, (n, d_in), in the parameters' dtype: formed once for the statistics, the gradient and J v."""
        return self._abar(self.x, self.dtype)

    @property
    def gradient_rows(self) -> Tensor:
        """abar in the dtype of the pass: in mixed precision not all cases are ever converted."""
        return self.rows if self.s.dtype == self.dtype else self._abar(self.x, self.s.dtype)

    def first_rows(self, n: int) -> Tensor:
        """The first n of `rows`; in mixed precision the others are not formed for it."""
        whole = self.s.dtype == self.dtype or n >= self.x.shape[0]
        return self.rows[:n] if whole else self._abar(self.x[:n], self.dtype)

    def _abar(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return linear.homogeneous(self.user.block, x.to(dtype))

    @property
    def overwritten(self) -> bool:
        """Whether an in-place operation (for example an in-place ReLU) has changed the output since."""
        return self.s._version != self.version

    @cached_property
    def typed(self) -> Use:
        """The use in the parameters' dtype and with the cases first, as layer types are asked with it."""
        x = self.x.to(self.dtype) if self.x.is_floating_point() else self.x
        extras = {key: self.cases_first(value) for key, value in self.use.extras.items()}
        return replace(self.use, inputs=self.cases_first(x), output=self.cases_first(self.s), extras=extras)

    def release(self) -> None:
        """Let go of what was converted from a lower precision: of all calls together it is as large as a whole pass."""
        if self.x.dtype != self.dtype:
            self.__dict__.pop("typed", None)

    def cases_first(self, values: Tensor) -> Tensor:
        """A tensor of the use with the cases in its first dimension."""
        return values.transpose(0, 1) if self.axis == 1 and values.dim() > 1 else values


@dataclass
class Chunk:
    """Consecutive cases that went forward together.

    Attributes:
        z: The outputs, attached to the graph.
        calls: The calls of each block.
        order: Positions of the blocks in the order in which they were first called.
        bare: Whether the model returned outputs without an axis, (n,).
    """

    z: Tensor
    calls: list[list[Call]]
    order: list[int] = field(default_factory=list)
    bare: bool = False

    @property
    def fast(self) -> list[bool]:
        """Which blocks the fast path can serve in this chunk: called once, one row a case."""
        n = self.z.shape[0]
        return [
            len(calls) == 1 and calls[0].fast and calls[0].axis == 0 and calls[0].x.shape[0] == n
            for calls in self.calls
        ]


class Recorder:
    """Turns calls of modules into `Call`s of blocks.

    Args:
        blocks: The blocks.
        low: Dtype that autocast converts weights to.
        dtype: That of the parameters.
        checks: Whether what a Linear is called with is looked at before the call.

    Attributes:
        calls: The calls of each block.
        order: Positions of the blocks in the order in which they were first called.
        closed: Whether nothing is taken up any more.
    """

    def __init__(
        self, blocks: Sequence[ModelBlock], low: torch.dtype | None, dtype: torch.dtype, *, checks: bool = True
    ) -> None:
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.order: list[int] = []
        self.closed = False
        self._blocks, self._low, self._dtype, self._checks = blocks, low, dtype, checks
        self._users: dict[int, dict[str, tuple[int, User]]] = {}
        for index, block in enumerate(blocks):
            for user in block.users:
                self._users.setdefault(id(user.module), {})[user.part] = index, user

    def emit(self, module: nn.Module, use: Use) -> None:
        """Take up a use; one outside the graph (under no_grad, in a recomputation) is none."""
        found = self._users[id(module)].get(use.part)
        if self.closed or found is None or not torch.is_grad_enabled() or not use.output.requires_grad:
            return
        if torch._C._current_graph_task_id() != -1:  # a backward pass runs a checkpointed part again
            return
        index, user = found
        s = use.output.detach()
        edge, version = get_gradient_edge(use.output), use.output._version
        if not self.calls[index]:
            self.order.append(index)
        kept = Use(use.part, use.inputs, s, use.extras)
        call = Call(self._blocks[index], user, kept, s, edge, version, self._dtype)
        self.calls[index].append(call)
        self.took(call, use.output)

    def took(self, call: Call, output: Tensor) -> None:
        """Called with each use that was taken up, and its output in the graph; nothing by default."""

    def hooks(self, user: User) -> Iterator[Any]:
        """Hooks on a module that is seen from outside."""
        module = user.module
        if self._checks and linear.is_linear(module):
            yield module.register_forward_pre_hook(self._check(user), with_kwargs=True)
        yield module.register_forward_hook(self._record(user), with_kwargs=True)

    def _check(self, user: User) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            if isinstance(x, Tensor) and x.dtype == self._low:  # autocast will convert the weights
                x = x.new_empty((), dtype=self._dtype).expand(x.shape)
            linear.check_fit(user.name, module, x)

        return hook

    def _record(self, user: User) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            if user.type is None:
                self.emit(module, Use("", cast("Tensor", first_argument(args, kwargs)).detach(), output, {}))
                return
            for use in user.type.uses(module, args, kwargs, output):
                self.emit(module, use)

        return hook


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer was called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def capture(
    call: Callable[[], Any],
    model: nn.Module,
    blocks: Sequence[ModelBlock],
    *,
    like: Tensor,
    low: torch.dtype | None = None,
    output: Output = None,
) -> Chunk:
    """Run a forward pass and keep what its blocks saw.

    Args:
        call: Runs the model.
        model: The model.
        blocks: Its blocks.
        like: A parameter, for dtype and device.
        low: Run it under autocast to this dtype.
        output: Where z is in what the model returns.
    """
    recorder = Recorder(blocks, low, like.dtype)
    with (
        torch.enable_grad(),
        as_written(model),
        autocast(like.device.type, low),
        installed(blocks, recorder.emit),
        listening(blocks, recorder),
    ):
        z = find_output(call(), output)
    return Chunk(z.unsqueeze(1) if z.dim() == 1 else z, recorder.calls, recorder.order, z.dim() == 1)


class _InOtherForm:
    """Stands for torch's function of reentrant checkpoints, which it looks up whenever it is called."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """The same checkpoint, not reentrant; so are those inside it, which backward passes run again."""

        def run(*inner: Any) -> Any:
            with _without_reentrance():
                return function(*inner)

        return checkpoint.checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def _without_reentrance() -> Iterator[None]:
    own = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _InOtherForm  # type: ignore[misc,assignment]  # has all that is asked of it
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = own  # type: ignore[misc]


@contextmanager
def listening(blocks: Sequence[ModelBlock], recorder: Recorder) -> Iterator[None]:
    """Hooks on all modules that are seen from outside; the others tell of their uses, see `installed`."""
    handles: list[Any] = []
    seen: set[int] = set()
    try:
        for block in blocks:
            for user in block.users:
                if id(user.module) not in seen and not tells(user):
                    handles += recorder.hooks(user)
                seen.add(id(user.module))
        yield
    finally:
        for handle in handles:
            handle.remove()


def tells(user: User) -> bool:
    """Whether the module runs a forward that tells of its uses, because hooks do not see into it."""
    return user.type is not None and user.type.forward(user.module, lambda _: None) is not None


@contextmanager
def installed(blocks: Sequence[ModelBlock], emit: Callable[[nn.Module, Use], None]) -> Iterator[None]:
    """Forwards that tell of their uses, instead of those of modules which hooks cannot see into."""
    patched: dict[int, tuple[nn.Module, Any]] = {}
    try:
        for block in blocks:
            for user in block.users:
                module, kind = user.module, user.type
                if id(module) in patched or kind is None:
                    continue
                tell: Emit = lambda use, module=module: emit(module, use)  # type: ignore[misc]  # noqa: E731
                forward = kind.forward(module, tell)
                if forward is not None:
                    patched[id(module)] = module, module.__dict__.get("forward")
                    module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in patched.values():
            if own is None:
                del module.__dict__["forward"]
            else:  # somebody else's wrapper
                module.__dict__["forward"] = own


def silenced(blocks: Sequence[ModelBlock]) -> AbstractContextManager[None]:
    """The same forwards as in a capture, while nobody listens."""
    return installed(blocks, lambda _module, _use: None)


def autocast(device: str, low: torch.dtype | None) -> AbstractContextManager[Any]:
    """Torch's autocast to this dtype, or nothing."""
    # No cache: inside an autocast of the caller's it would outlive the step, and the weights it was made of.
    return nullcontext() if low is None else torch.autocast(device, low, cache_enabled=False)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run the model in forms that have all derivatives, with the same outputs.

    What is compiled inside it runs uncompiled. Attention runs without the short cut that it has in eval mode, whose
    outputs at padded positions are other ones, so that passes could not be compared. Torch's reentrant checkpoints,
    which give no gradients by parameters, run in their other form.
    """
    inside = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _without_reentrance(), torch.compiler.set_stance("force_eager") if inside else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
