r"""A mini-batch as a linear map of the parameters: outputs, gradient, g_i, and J v.

One forward pass serves everything. It runs in two chunks, the cases of the statistics and the rest, so that the
sampled backward pass costs its share of the cases only. J v is forward-mode differentiation through the model with
the layers' products already known: a layer's output is taken from the forward pass, only its tangent is computed.

In mixed precision the forward and backward passes run under torch's autocast. What leaves here (outputs, abar, g, the
gradient, J v) is in the parameters' dtype, and J v is computed in it: M has to tell directions apart that are nearly
parallel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacore.errors import UnsupportedModelError
from kfacore.nest import cases_of, repeat_cases, slice_cases
from kfacore.network.checks import check_calls, check_cases, check_chain, check_gradient
from kfacore.network.rules import Layer, find_layers
from kfacore.network.vectors import BlockVector
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.samples import LayerSamples

__all__ = ["Linearization", "Linearizer"]

_TRIES = 3
"""Mini-batches in which the checks are made as long as they come to nothing: with an output layer that starts at zero
they cannot see what lies below it, and one that stays dead must not cost every step."""


@dataclass
class Call:
    """One call of a layer in a forward pass."""

    layer: Layer
    x: Tensor
    s: Tensor
    edge: GradientEdge
    version: int
    dtype: torch.dtype

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
        return self.layer.rule.inputs(self.layer.info, x.to(dtype))

    @property
    def overwritten(self) -> bool:
        """Whether an in-place operation (for example an in-place ReLU) has changed the layer's output since."""
        return self.s._version != self.version


@dataclass
class Chunk:
    """Consecutive cases that went forward together."""

    z: Tensor
    calls: list[Call] = field(default_factory=list)


class Linearizer:
    """Turns mini-batches into linearizations of one model.

    Attributes:
        model: The model.
        layers: Its layers; in execution order once the first mini-batch has been seen.

    Args:
        model: Any module whose trainable parameters lie in supported layers.
        structure: ``"chain"`` if the model must be a chain of layers, else ``"any"``.

    A compiled model runs uncompiled here: torch supports neither hooks on its layers nor forward-mode through it.

    Raises:
        UnsupportedModelError: Some module cannot be preconditioned; the message names it.
    """

    def __init__(self, model: nn.Module, structure: str = "any") -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile keeps the module under
        self.structure = structure
        self.layers = find_layers(self.model)
        self.ordered = False
        self._trainable = [(name, p, p.requires_grad) for name, p in self.model.named_parameters()]
        self._checked: tuple[bool, ...] | None = None
        self._tries = 0
        self._several = False

    def set_order(self, names: Sequence[str]) -> None:
        """Take up the execution order of a saved state.

        Raises:
            UnsupportedModelError: The model does not have exactly these layers.
        """
        known = {layer.info.name: layer for layer in self.layers}
        if set(known) != set(names):
            raise UnsupportedModelError(
                f"the saved optimizer state has layers {', '.join(names)}; this model has {', '.join(known)}"
            )
        self.layers = [known[name] for name in names]
        self.ordered = True

    def __call__(
        self, inputs: Any, statistics_cases: int | None = None, low: torch.dtype | None = None, pulled_cases: int = 0
    ) -> Linearization:
        """Run the forward pass.

        Args:
            inputs: Any nest of tensors whose first dimension is the case.
            statistics_cases: How many of the first cases the estimator will use; all if left out.
            low: Run forward and backward passes under autocast to this dtype.
            pulled_cases: How many of the first cases `Linearization.pull_back` will be asked for.

        Raises:
            UnsupportedModelError: A layer was used twice or not at all, the layers' order changed, cases are mixed,
                the forward pass draws random numbers, or a parameter was frozen or unfrozen; the message names it.
        """
        self._require_same_parameters()
        m = cases_of(inputs)
        n = m if statistics_cases is None else statistics_cases
        bounds = sorted({0, n, max(n, pulled_cases), m})
        chunks = [self._forward(slice_cases(inputs, a, b), low) for a, b in pairwise(bounds)]
        linearization = Linearization(self, inputs, chunks)
        modes = tuple(module.training for module in self.model.modules())
        # For the first time, when some module was switched between train and eval, and when there are several cases for
        # the first time: one cannot show that cases are mixed.
        if self._checked != modes or (m > 1 and not self._several):
            self._checked, self._tries = modes, _TRIES
        if self._tries:
            first = chunks[0] if low is None else self._forward(slice_cases(inputs, 0, n), None)
            sure = self._check(inputs, first)
            self._several = self._several or m > 1
            self._tries = 0 if sure and m > 1 else self._tries - 1
        return linearization

    def _check(self, inputs: Any, chunk: Chunk) -> bool:
        """Refuse what would be silently wrong; False where the numbers of this mini-batch could not show it."""
        with _uncompiled(self.model):
            alone = check_cases(self.model, inputs)
        whole = check_gradient(self.layers, chunk)
        if self.structure == "chain":
            check_chain(self.layers, chunk)
        return alone and whole

    def _require_same_parameters(self) -> None:
        for name, parameter, trainable in self._trainable:
            if parameter.requires_grad != trainable:
                done = "frozen" if trainable else "unfrozen"
                raise UnsupportedModelError(
                    f"{name} was {done} (requires_grad = {parameter.requires_grad}) after the optimizer was built, "
                    "which keeps statistics of the parameters it found; build the optimizer again"
                )

    def _forward(self, inputs: Any, low: torch.dtype | None) -> Chunk:
        calls: list[Call] = []
        like = self.layers[0].parameters[0]

        def check(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = _input(args, kwargs)
                if isinstance(x, Tensor) and x.dtype == low:  # autocast will convert the weights
                    x = x.new_empty((), dtype=like.dtype).expand(x.shape)
                layer.rule.check_input(layer.info, module, x)

            return hook

        def record(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                x = cast("Tensor", _input(args, kwargs)).detach()
                calls.append(Call(layer, x, output.detach(), get_gradient_edge(output), output._version, like.dtype))

            return hook

        handles = [layer.module.register_forward_pre_hook(check(layer), with_kwargs=True) for layer in self.layers]
        handles += [layer.module.register_forward_hook(record(layer), with_kwargs=True) for layer in self.layers]
        try:
            with torch.enable_grad(), _uncompiled(self.model), _autocast(like.device.type, low):
                z = self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        order = check_calls(self.layers, [call.layer for call in calls], z, cases_of(inputs), ordered=self.ordered)
        self.layers, self.ordered = order, True
        return Chunk(z, calls)


class Linearization:
    """One mini-batch, linearised at the current parameters.

    Args:
        linearizer: What made it.
        inputs: The mini-batch's inputs.
        chunks: Its forward passes, in the order of the cases.
    """

    def __init__(self, linearizer: Linearizer, inputs: Any, chunks: list[Chunk]) -> None:
        self.layers = linearizer.layers
        self._model = linearizer.model
        self._inputs = inputs
        self._chunks = chunks
        self._dtype = self.layers[0].parameters[0].dtype
        self.cases = sum(chunk.z.shape[0] for chunk in chunks)

    def outputs(self) -> list[Tensor]:
        """z of each chunk, (n_c, o), detached, in the order of the cases."""
        return [chunk.z.detach().to(self._dtype) for chunk in self._chunks]

    def statistics_outputs(self) -> Tensor:
        """z of the estimator's cases, (n, o), detached."""
        return self._chunks[0].z.detach().to(self._dtype)

    def samples(
        self, estimator: Estimator, y: Tensor, likelihood: Likelihood, generator: torch.Generator
    ) -> list[LayerSamples]:
        """Run an estimator's backward passes and return what each layer saw, in execution order.

        Args:
            estimator: Whose cases the first chunk holds.
            y: The mini-batch's targets.
            likelihood: The likelihood.
            generator: Source of every draw.
        """
        z = self.statistics_outputs()
        return self.backpropagate(estimator.output_vectors(z, y[: z.shape[0]], likelihood, generator))

    def backpropagate(
        self,
        vectors: Tensor,  # (k, n, o)
    ) -> list[LayerSamples]:
        """Send k sets of output vectors back through the estimator's cases; no weight gradients are formed.

        Args:
            vectors: One vector a case and pass, a derivative by z.

        Returns:
            abar and g of each layer.
        """
        chunk = self._chunks[0]
        passes = [[g.to(self._dtype) for g in _layer_gradients(chunk, v, retain=True)] for v in vectors.unbind(0)]
        return [
            LayerSamples(
                call.rows, passes[0][i].unsqueeze(0) if len(passes) == 1 else torch.stack([g[i] for g in passes])
            )
            for i, call in enumerate(chunk.calls)
        ]

    def gradient(
        self,
        vectors: Sequence[Tensor],  # (n_c, o) a chunk
        out: BlockVector,
        *,
        retain: bool = False,
    ) -> BlockVector:
        """J^T v summed over all cases, written into ``out``.

        Args:
            vectors: Derivatives by z of each chunk of `outputs`.
            out: Receives the result.
            retain: Keep the graph for further backward passes; otherwise this is the last use of them.
        """
        return _accumulate(self._chunks, vectors, out, retain=retain)

    def pull_back(
        self,
        v: Tensor,  # (n, o)
        out: BlockVector,
    ) -> BlockVector:
        """J^T v summed over the first n cases, written into ``out``; keeps the graph, which `gradient` must retain."""
        parts: list[Tensor] = []
        for chunk in self._chunks:
            if v.shape[0] == 0:
                break
            size = chunk.z.shape[0]
            parts.append(nn.functional.pad(v[:size], (0, 0, 0, max(0, size - v.shape[0]))))
            v = v[size:]
        return _accumulate(self._chunks[: len(parts)], parts, out, retain=True)

    def jvp(
        self,
        directions: Sequence[Sequence[Tensor]],  # k times one block (d_out, d_in) a layer
        cases: int | None = None,
    ) -> Tensor:  # (k, n, o)
        """J v for several directions in one pass, on the first cases of the mini-batch.

        The model runs forward once on k copies of the cases, each copy moving in its own direction. Must be called
        before the parameters change.

        Raises:
            UnsupportedModelError: The model uses an operation without forward-mode derivative.
        """
        n = self.cases if cases is None else cases
        k = len(directions)
        _load_forward_mode()
        with torch.no_grad(), _uncompiled(self._model), fwd.dual_level(), self._tangents(directions, n):
            try:
                z = self._model(repeat_cases(slice_cases(self._inputs, 0, n), k))
            except NotImplementedError as error:  # what torch raises where it has no formula for an operation
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: an operation of the model has no forward-mode derivative, which "
                    f"the exact quadratic model needs ({str(error).splitlines()[0]}); use momentum = 'fixed'"
                ) from error
            tangent = _unpack(z)[1]
        if tangent is None:
            tangent = torch.zeros_like(z)
        return tangent.view(k, n, *tangent.shape[1:])

    @contextmanager
    def _tangents(self, directions: Sequence[Sequence[Tensor]], n: int) -> Iterator[None]:
        """Replace each layer's forward by one that takes the known output and computes its tangent."""
        patched: list[tuple[nn.Module, Any]] = []
        try:
            for i, layer in enumerate(self.layers):
                calls = [chunk.calls[i] for chunk in self._chunks]
                # An instance attribute shadows the class's forward; hooks of the user still run around it.
                patched.append((layer.module, layer.module.__dict__.get("forward")))
                layer.module.__dict__["forward"] = _tangent_forward(layer, calls, [d[i] for d in directions], n)
            yield
        finally:
            for module, own in patched:
                if own is None:
                    del module.__dict__["forward"]
                else:  # somebody else's wrapper
                    module.__dict__["forward"] = own


def _autocast(device: str, low: torch.dtype | None) -> AbstractContextManager[Any]:
    # No cache: inside an autocast of the caller's it would outlive the step, and the weights it was made of.
    return nullcontext() if low is None else torch.autocast(device, low, cache_enabled=False)


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run what is compiled inside the model as it was written."""
    inside = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if inside else nullcontext()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer was called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _layer_gradients(chunk: Chunk, v: Tensor, *, retain: bool) -> Sequence[Tensor]:
    """g of each layer for output vectors v."""
    return torch.autograd.grad(chunk.z, [call.edge for call in chunk.calls], v.to(chunk.z.dtype), retain_graph=retain)


def _accumulate(chunks: list[Chunk], vectors: Sequence[Tensor], out: BlockVector, *, retain: bool) -> BlockVector:
    """J^T v summed over chunks."""
    for index, (chunk, v) in enumerate(zip(chunks, vectors, strict=True)):
        gradients = _layer_gradients(chunk, v, retain=retain)
        for call, g, block in zip(chunk.calls, gradients, out.blocks, strict=True):
            call.layer.rule.gradient(call.gradient_rows, g, block, accumulate=index > 0)
    return out


def _tangent_forward(layer: Layer, calls: list[Call], blocks: list[Tensor], n: int) -> Callable[[Tensor], Tensor]:
    known = not any(call.overwritten for call in calls)
    k = len(blocks)

    def forward(input: Tensor) -> Tensor:  # the name nn.Linear.forward has, for keyword calls
        x, dx = _unpack(input)
        s = _first(_outputs, calls, n, k).to(calls[0].dtype) if known else layer.rule.primal(layer.module, x)
        tangent = layer.rule.tangent(layer.module, _first(Call.first_rows, calls, n), dx, blocks)
        return cast("Tensor", fwd.make_dual(s, tangent))  # type: ignore[no-untyped-call]  # torch has no types here

    return forward


@cache
def _load_forward_mode() -> None:
    """Make torch load its forward-mode decompositions, which warns of a deprecated part of torch itself."""
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]  # torch has no types here


def _unpack(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = fwd.unpack_dual(dual)  # type: ignore[no-untyped-call]  # torch has no types here
    return primal, tangent


def _outputs(call: Call, n: int) -> Tensor:
    return call.s[:n]


def _first(of: Callable[[Call, int], Tensor], calls: list[Call], n: int, copies: int = 1) -> Tensor:
    """What the first n cases have in consecutive chunks, several times over."""
    taken: list[Tensor] = []
    for call in calls:
        if n > 0:
            taken.append(of(call, n))
        n -= call.s.shape[0]
    return taken[0] if len(taken) * copies == 1 else torch.cat(taken * copies)
