r"""A mini-batch as a linear map of the parameters: outputs, gradient, rows and g of every block, and J v.

One forward pass serves everything. Where cases may be cut it runs in two chunks, the cases of the statistics and the
rest, so that the sampled backward pass costs its share of the cases only; else in one, and everything is of the whole
mini-batch.

In mixed precision the forward and backward passes run under torch's autocast. What leaves here (outputs, abar, g, the
gradient, J v) is in the parameters' dtype, and J v is computed in it: M has to tell directions apart that are nearly
parallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.nest import slice_cases
from kfacore.network import jvp, linear
from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Chunk, as_written, silenced
from kfacore.network.outputs import read_output
from kfacore.network.passes import gather, send_back
from kfacore.network.pulling import pulled
from kfacore.network.rows import Counting
from kfacore.network.state import ModelState
from kfacore.network.vectors import BlockVector
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.samples import LayerSamples

if TYPE_CHECKING:
    from kfacore.network.linearizer import Linearizer

__all__ = ["Before", "Linearization", "Path"]

Path = Literal["fast", "general", "not used"]
"""How a mini-batch serves a block: products straight into it, or by its parameters."""


@dataclass(frozen=True)
class Before:
    """Where generators and the model's state stood before the forward pass; None where it does not move them."""

    draws: Mapping[object, Any] | None = None
    state: ModelState | None = None


class Linearization:
    """One mini-batch, linearised at the current parameters.

    Args:
        linearizer: What made it.
        inputs: The mini-batch's inputs.
        chunks: Its forward passes, in the order of the cases.
        kept: The estimator's cases, the first of them.
        before: What a further pass has to put back.
        low: Autocast dtype of the forward passes.

    Attributes:
        layers: The blocks, in execution order.
        cases: Number of cases.
        plain: Whether the fast path serves all of it.
        bare: Whether the model returned one number a case, without an axis of outputs.
    """

    def __init__(
        self,
        linearizer: Linearizer,
        inputs: Any,
        chunks: list[Chunk],
        kept: int,
        before: Before | None = None,
        low: torch.dtype | None = None,
    ) -> None:
        self.layers: list[ModelBlock] = linearizer.layers
        self._linearizer = linearizer
        self._model: nn.Module = linearizer.model
        self._inputs = inputs
        self._chunks = chunks
        self._kept = kept
        self._before = before or Before()
        self._low = low
        self._dtype = self.layers[0].parameters[0].dtype
        self._fast = [all(each) for each in zip(*(chunk.fast for chunk in chunks), strict=True)]
        self._outputs: list[Tensor] | None = None
        self.bare = chunks[0].bare
        self.cases = sum(chunk.z.shape[0] for chunk in chunks)
        self.plain = all(self._fast) and linearizer.cut and chunks[0].z.dim() == 2

    @property
    def paths(self) -> list[Path]:
        """How each block is served: ``"not used"`` if no chunk has a call of it and it is no raw parameter."""
        calls = [any(each) for each in zip(*(chunk.calls for chunk in self._chunks), strict=True)]
        return [
            "fast" if fast else "general" if used or not block.users else "not used"
            for block, fast, used in zip(self.layers, self._fast, calls, strict=True)
        ]

    @property
    def cut(self) -> bool:
        """Whether it may be cut by cases."""
        return self._linearizer.cut

    def release(self) -> None:
        """Let go of the graph, and of what blocks saw; the outputs stay. See `renewed`."""
        self._chunks = [Chunk(chunk.z.detach(), [], chunk.order, chunk.bare) for chunk in self._chunks]

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """For a while the graph that `release` let go of: the same forward passes, with the same draws."""
        released, bounds = self._chunks, [0]
        for chunk in released:
            bounds.append(bounds[-1] + chunk.z.shape[0])
        with self._replayed():
            self._chunks = self._linearizer.forward_chunks(
                self._inputs, bounds if self._linearizer.cut else (), self._low
            )
        try:
            yield
        finally:
            self._chunks = released

    def model_cases(self, cases: int) -> int:
        """How many cases J v is really of when it is asked for so many: all where a mini-batch is not cut."""
        return cases if self._linearizer.cut else self.cases

    def outputs(self) -> list[Tensor]:
        """z of each chunk, (n_c, ..., o), detached, in the order of the cases."""
        if self._outputs is None:
            self._outputs = [chunk.z.detach().to(self._dtype) for chunk in self._chunks]
        return self._outputs

    def statistics_outputs(self) -> Tensor:
        """z of the estimator's cases, (n, ..., o), detached."""
        z = self.outputs()[0]
        return z if len(z) <= self._kept else z[: self._kept]

    def samples(
        self,
        estimator: Estimator,
        y: Tensor,
        likelihood: Likelihood,
        generator: torch.Generator,
        *,
        valid: Tensor | None = None,
        total: float | Tensor | None = None,
    ) -> list[LayerSamples | None]:
        """Run an estimator's backward passes and return what each block saw, in execution order.

        Args:
            estimator: Whose cases come first.
            y: The mini-batch's targets.
            likelihood: The likelihood.
            generator: Source of every draw.
            valid: Positions that count, (n, ...) for the estimator's cases; all if left out.
            total: S; the estimator's cases if left out.

        Returns:
            One entry a block, None for a block that the mini-batch did not use.
        """
        z = self.statistics_outputs()
        vectors = estimator.output_vectors(z, y[: z.shape[0]], likelihood, generator)
        if not (self.plain or estimator.draws):
            vectors = vectors * self.signs(z, generator)
        return self.backpropagate(vectors, valid=valid, total=total)

    def signs(self, z: Tensor, generator: torch.Generator, part: tuple[Tensor, int] | None = None) -> Tensor:
        """A random sign for every case and position: their products vanish in the mean, whatever the vectors are.

        What is a sum over cases and positions before it is squared, as the gradient by a raw parameter, or g behind a
        norm of the batch, is an unbiased estimate only so where vectors are not drawn.

        Args:
            z: Outputs of the cases.
            generator: Source of the signs.
            part: Places of their rows among those of all that several processes share, and how many those are.
        """
        if part is not None:
            own, whole = part
            signs = torch.randint(0, 2, (whole,), generator=generator, device=generator.device)[own.to(z.device)]
            return (2 * signs - 1).to(z.device, z.dtype).view(*z.shape[:-1], 1)
        signs = torch.randint(0, 2, z.shape[:-1], generator=generator, device=generator.device)
        return (2 * signs - 1).to(z.device, z.dtype).unsqueeze(-1)

    def seen(
        self, vectors: Tensor, *, valid: Tensor | None = None, total: float | Tensor | None = None
    ) -> Iterator[tuple[float, Sequence[LayerSamples | None]]]:
        """What `backpropagate` returns, with its share of the estimator's cases, 1."""
        yield 1.0, self.backpropagate(vectors, valid=valid, total=total)

    def backpropagate(
        self,
        vectors: Tensor,  # (k, n, ..., o)
        *,
        valid: Tensor | None = None,
        total: float | Tensor | None = None,
    ) -> list[LayerSamples | None]:
        """Send k sets of output vectors back through the estimator's cases.

        No weight gradients are formed but those of `diagonal` blocks.

        Args:
            vectors: One vector a case, position and pass, a derivative by z.
            valid: Positions that count, (n, ...); all if left out.
            total: S; n if left out.

        Returns:
            What each block saw; None for one that was not used.
        """
        chunk = self._chunks[0]
        if self.plain and valid is None and total is None:
            passes = [[g.to(self._dtype) for g in self._edges(chunk, v, retain=True)] for v in vectors.unbind(0)]
            return [
                LayerSamples(
                    calls[0].rows,
                    passes[0][i].unsqueeze(0) if len(passes) == 1 else torch.stack([g[i] for g in passes]),
                )
                for i, calls in enumerate(chunk.calls)
            ]
        return self._general_samples(chunk, vectors, valid, total)

    def _general_samples(
        self, chunk: Chunk, vectors: Tensor, valid: Tensor | None, total: float | Tensor | None
    ) -> list[LayerSamples | None]:
        n = chunk.z.shape[0]
        with self._same_forwards():
            passes = send_back(self.layers, chunk, _padded(vectors, n, 1))
        kept = n if self._linearizer.mixes else self._kept
        mask = None if valid is None else _padded(valid.reshape(valid.shape[0], -1), n)
        counting = Counting(n, kept, mask, vectors.shape[1] if total is None else total)
        return gather(self.layers, chunk.calls, passes, counting, self._linearizer.reduced)

    def gradient(
        self,
        vectors: Sequence[Tensor],  # (n_c, ..., o) a chunk
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
        return self._accumulate(self._chunks, vectors, out, retain=retain)

    def pull_back(
        self,
        v: Tensor,  # (n, ..., o)
        out: BlockVector,
    ) -> BlockVector:
        """J^T v summed over the first n cases, written into ``out``; keeps the graph, which `gradient` must retain."""
        if len(v) == 0:
            out.flat.zero_()
        parts: list[Tensor] = []
        for chunk in self._chunks:
            if v.shape[0] == 0:
                break
            size = chunk.z.shape[0]
            parts.append(_padded(v[:size], size))
            v = v[size:]
        return self._accumulate(self._chunks[: len(parts)], parts, out, retain=True)

    def jvp(
        self,
        directions: Sequence[Sequence[Tensor]],  # k times one matrix a block
        cases: int | None = None,
    ) -> Tensor:  # (k, n, ..., o)
        """J v for several directions, on the first cases of the mini-batch: on `model_cases` of them.

        In one pass on k copies of the cases where the fast path serves, else in one pass a direction. Must be called
        before the parameters change.

        Raises:
            UnsupportedModelError: The model has an operation through which J v cannot be taken.
        """
        n = self.model_cases(self.cases if cases is None else cases)
        way = self._linearizer.way
        if way == "none":
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: J v cannot be taken through an operation of the model, and the exact "
                f"quadratic model needs it ({self._linearizer.reason}); use momentum = 'fixed', or Preconditioned"
            )
        if way == "forward" and self.plain:
            return self._known_products(directions, n)
        parameters = self._linearizer.named
        names = self._linearizer.names
        moves = [jvp.tangents_of(self.layers, names, blocks) for blocks in directions]
        inputs = self._inputs_of(n)
        output = self._linearizer.output
        if way == "double":
            with self._again():
                return jvp.double_backward(self._model, inputs, parameters, moves, output)
        found = []
        for tangents in moves:
            with self._again():
                found.append(jvp.forward_mode(self._model, self._inputs_of(n), parameters, tangents, output))
        return torch.stack(found)

    def _known_products(self, directions: Sequence[Sequence[Tensor]], n: int) -> Tensor:
        inputs = self._inputs_of(n)
        output = self._linearizer.output
        try:
            with self._again():
                z, tangent = jvp.known_products(self._model, inputs, self.layers, self._chunks, directions, n, output)
        except NotImplementedError as error:  # what torch raises where it has no formula for an operation
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: an operation of the model has no forward-mode derivative, which "
                f"the exact quadratic model needs ({str(error).splitlines()[0]}); use momentum = 'fixed'"
            ) from error
        if tangent is None:
            tangent = torch.zeros_like(z)
        return tangent.view(len(directions), n, *tangent.shape[1:])

    def again(self) -> Tensor:  # (n, ..., o)
        """z of the whole mini-batch at the model's current parameters: same draws, same buffers before it.

        Nothing moves: neither buffers nor generators. For rho, which compares one function at two places.
        """
        with torch.no_grad(), self._again():
            z = read_output(self._model(self._inputs_of(self.cases)), self._linearizer.output)
        return z.to(self._dtype)

    def _inputs_of(self, n: int) -> Any:
        """Inputs of the first n cases, for one pass."""
        inputs = slice_cases(self._inputs, 0, n) if self._linearizer.cut and n < self.cases else self._inputs
        return self._linearizer.own_inputs(inputs)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Run the model once more as in its forward pass."""
        with as_written(self._model), self._same_forwards(), self._replayed():
            yield

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Draws and buffers as they were before the forward pass."""
        draws, state = self._before.draws, self._before.state
        with (
            nullcontext() if draws is None else self._linearizer.draws.replaying(draws),
            nullcontext() if state is None else state.replaying(),
        ):
            yield

    def _same_forwards(self) -> AbstractContextManager[None]:
        """The forwards of the first pass: a backward pass may run a checkpointed part again; others draw otherwise."""
        return silenced(self.layers) if self._linearizer.tells else nullcontext()

    def _edges(self, chunk: Chunk, v: Tensor, *, retain: bool) -> Sequence[Tensor]:
        """g of each layer of a chunk that the fast path serves; zero where nothing depends on it."""
        edges = [calls[0].edge for calls in chunk.calls]
        found = pulled(chunk.z, edges, v, retain=retain)
        return [torch.zeros_like(calls[0].s) if g is None else g for g, calls in zip(found, chunk.calls, strict=True)]

    def _accumulate(
        self, chunks: list[Chunk], vectors: Sequence[Tensor], out: BlockVector, *, retain: bool
    ) -> BlockVector:
        """J^T v summed over chunks: by edges straight into fast blocks, by parameters into the others."""
        loose = {
            id(parameter): parameter
            for block, fast in zip(self.layers, self._fast, strict=True)
            if not fast
            for parameter in block.parameters
        }
        for index, (chunk, v) in enumerate(zip(chunks, vectors, strict=True)):
            edges: list[Any] = [calls[0].edge for calls, fast in zip(chunk.calls, self._fast, strict=True) if fast]
            roots = [*edges, *loose.values()]
            with self._same_forwards():
                found = pulled(chunk.z, roots, v, retain=retain)
            by_parameter = dict(zip(loose, found[len(edges) :], strict=True))
            self._write(chunk, found, by_parameter, out, accumulate=index > 0)
        return out

    def _write(
        self,
        chunk: Chunk,
        found: Sequence[Tensor | None],
        by_parameter: Mapping[int, Tensor | None],
        out: BlockVector,
        *,
        accumulate: bool,
    ) -> None:
        edges = iter(found)
        for block, calls, fast, matrix in zip(self.layers, chunk.calls, self._fast, out.blocks, strict=True):
            if fast:
                g = next(edges)
                if g is not None:
                    linear.add_gradient(calls[0].gradient_rows, g, matrix, accumulate=accumulate)
                elif not accumulate:
                    matrix.zero_()
                continue
            if not accumulate:
                matrix.zero_()
            if all(by_parameter[id(parameter)] is None for parameter in block.parameters):
                continue

            def of(parameter: nn.Parameter) -> Tensor:
                g = by_parameter[id(parameter)]
                return torch.zeros_like(parameter) if g is None else g

            for part, share in zip(block.split(matrix), block.view(of), strict=True):
                part += share


def _padded(v: Tensor, n: int, dim: int = 0) -> Tensor:
    """Zero beyond its cases."""
    missing = n - v.shape[dim]
    return v if missing == 0 else torch.cat([v, v.new_zeros(*v.shape[:dim], missing, *v.shape[dim + 1 :])], dim)
