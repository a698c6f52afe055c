"""What kind of function a model is, found out by running it on its first mini-batch.

Decides how its mini-batches are treated from then on: whether cases may be cut into chunks, which draws and buffers a
further pass has to put back, which blocks' rows account for the whole gradient, and how J v is taken. The passes use
parameters that are moved a little, so that an output layer which starts at zero hides nothing; buffers and generators
end as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.compiler import uncompiled_mode
from kfacore.errors import KfacError, UnsupportedModelError
from kfacore.host import full_precision
from kfacore.nest import map_nest, repeat_cases, slice_cases, tensors_of
from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Chunk, as_written, capture, silenced
from kfacore.network.draws import Draws, Watch
from kfacore.network.facts import Facts, Way, close, common_cases, equal
from kfacore.network.jvp import double_backward, forward_mode, tangents_of, within
from kfacore.network.outputs import Output, read_output
from kfacore.network.pulling import pulled_whole
from kfacore.network.rows import all_equal, as_vector, explained
from kfacore.network.standing import call_with
from kfacore.network.state import ModelState

__all__ = ["Study"]


class Study:
    """One mini-batch's look at a model.

    Args:
        model: The model.
        blocks: Its blocks.
        names: Qualified names of its trainable parameters.
        draws: Its generators.
        output: Where z is in what it returns.
        inputs: The mini-batch.
        tangents: Whether J v will be asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ModelBlock],
        names: Mapping[nn.Parameter, str],
        draws: Draws,
        output: Output,
        inputs: Any,
        tangents: bool,
    ) -> None:
        self._model, self._blocks, self._names = model, blocks, names
        self._draws, self._output, self._tangents = draws, output, tangents
        self._inputs = inputs
        self._like = blocks[0].parameters[0]
        self._state = ModelState(model)
        draws.look()
        self._before = draws.state()
        self._probe = self._moved_parameters()
        self._after = self._state
        self._overwrites = False
        self._buffers_move = False

    @full_precision()
    def facts(self) -> Facts:
        """Run the model and say what was seen.

        Raises:
            UnsupportedModelError: Two passes with the same draws, buffers and inputs give different outputs, or no
                parameter has an influence.
        """
        with as_written(self._model):
            chunk, drawn, keeps, foreign = self._first_pass()
            finite = bool(torch.isfinite(chunk.z.detach()).all())
            if finite:
                self._require_replay(chunk.z.detach())
            stays = not self._state_matters(keeps, chunk.z.detach())
            mixes, whole = self._mixing(chunk.z.detach(), drawn, stays)
            v = self._vector(chunk.z)
            axes = {} if mixes else self._axes(chunk, v)
            for calls, axis in ((chunk.calls[index], axis) for index, axis in axes.items()):
                for call in calls:
                    call.axis = axis
            gradients, outside, pooled = self._gradients(chunk, v)
            way, reason = self._way(chunk.z.detach(), v, gradients, foreign) if self._tangents else ("forward", "")
        return Facts(
            cut=not whole,
            draws=tuple(drawn),
            keeps=keeps,
            mixes=mixes,
            way=way,
            reason=reason,
            whole=whole,
            settled=finite,
            overwrites=self._overwrites,
            outside=outside,
            pooled=pooled,
            axes=tuple(axes.items()),
        )

    # --- passes -----------------------------------------------------------------------------------------------------

    def _moved_parameters(self) -> dict[str, Tensor]:
        """The trainable parameters plus a little noise, from a generator of our own."""
        generator = torch.Generator().manual_seed(0)
        found: dict[str, Tensor] = {}
        for parameter in {id(p): p for p in self._model.parameters() if p.requires_grad}.values():
            value = parameter.detach()
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
            scale = value.square().mean().sqrt() if value.numel() else value.sum()
            scale = torch.where(torch.isfinite(scale) & (scale > 0), 0.1 * scale, 0.01)
            found[self._names[parameter]] = (value + scale * noise).requires_grad_()
        return found

    @contextmanager
    def _again(self) -> Iterator[None]:
        """The draws, the buffers and the forwards of the first pass: others may draw in another order."""
        with self._draws.replaying(self._before), self._state.replaying(), silenced(self._blocks):
            yield

    def _call(self, inputs: Any) -> Any:
        return call_with(self._model, self._probe, (self._fresh(inputs),))

    def _fresh(self, inputs: Any) -> Any:
        return map_nest(torch.clone, inputs) if self._overwrites else inputs

    def _z(self, inputs: Any) -> Tensor:
        """Outputs of a further pass."""
        with torch.no_grad(), self._again():
            return read_output(self._call(inputs), self._output)

    def _first_pass(self) -> tuple[Chunk, list[str], bool, list[str]]:
        """With everything recorded: the chunk, generators that moved, whether the model's state did, foreign ops."""
        watch = uncompiled_mode(Watch(self._draws))
        with self._again():
            try:
                with watch:
                    chunk = self._captured()
            except (RuntimeError, TypeError):  # of operations that cannot be watched; another fault shows below
                self._draws.restore(self._before)
                chunk = self._captured()
            drawn = self._draws.moved({**self._before, **watch.first})
            keeps = self._state.moved_buffers() or self._state.moved_attributes()
            self._buffers_move = self._state.moved_buffers()
            self._after = ModelState(self._model) if keeps else self._state
        if watch.first:  # met on the way: they were not put back with the others
            self._draws.restore(watch.first)
            self._before = {**self._before, **watch.first}
        return chunk, drawn, keeps, list(dict.fromkeys(watch.foreign))

    def _captured(self) -> Chunk:
        inputs = map_nest(torch.clone, self._inputs)
        versions = [tensor._version for tensor in tensors_of(inputs)]
        chunk = capture(lambda: self._call(inputs), self._model, self._blocks, like=self._like, output=self._output)
        self._overwrites = versions != [tensor._version for tensor in tensors_of(inputs)]
        return chunk

    def _require_replay(self, z: Tensor) -> None:
        """The same draws and buffers must give the same outputs."""
        if close(self._z(self._inputs), z):
            return
        name = self._first_difference()
        raise UnsupportedModelError(
            f"{name} draws random numbers from a generator that cannot be found and set back (not torch's, Python's or "
            "NumPy's, nor one that a module holds), so that the quadratic model and rho would see another function in "
            "every pass. Draw from torch's generator, or switch it off"
        )

    def _state_matters(self, keeps: bool, z: Tensor) -> bool:
        """Whether a pass moves what the next one reads, or a buffer, which must move once a step."""
        if not keeps or self._buffers_move:
            return keeps
        with (
            torch.no_grad(),
            self._draws.replaying(self._before),
            self._after.replaying(),
            silenced(self._blocks),
        ):
            return not close(read_output(self._call(self._inputs), self._output), z)

    def _first_difference(self) -> str:
        """The first leaf module whose outputs differ between two passes."""
        passes: list[list[tuple[str, Any]]] = []
        for _ in range(2):
            outputs: list[tuple[str, Any]] = []

            def record(name: str, to: list[tuple[str, Any]] = outputs) -> Callable[[nn.Module, Any, Any], None]:
                return lambda module, _args, out: to.append((f"{name} ({type(module).__name__})", out))  # noqa: B023

            leaves = [(name, module) for name, module in self._model.named_modules() if not any(module.children())]
            handles = [module.register_forward_hook(record(name)) for name, module in leaves]
            try:
                self._z(self._inputs)
            finally:
                for handle in handles:
                    handle.remove()
            passes.append(outputs)
        for (name, first), (_, second) in zip(*passes, strict=False):
            if isinstance(first, Tensor) and isinstance(second, Tensor) and not close(first, second):
                return str(name)
        return type(self._model).__name__

    # --- cases ------------------------------------------------------------------------------------------------------

    def _mixing(self, z: Tensor, drawn: Sequence[str], stays: bool) -> tuple[bool, str]:
        """Whether cases are mixed, and why a mini-batch is not cut."""
        n = common_cases(self._inputs)
        if n is None:
            return True, "the inputs hold more than tensors whose first dimension counts the examples"
        if n != z.shape[0]:
            return True, f"the outputs have {z.shape[0]} rows for {n} examples of inputs"
        try:
            if self._mixed(self._inputs, n):
                return True, "the outputs of an example depend on other examples"
            if drawn:
                return False, f"the forward pass draws from {', '.join(drawn)}"
            if not stays:
                return False, "the forward pass moves buffers or attributes of modules"
            if n > 1 and not self._same_in_parts(z, n):
                return False, "the outputs of an example depend on its place in the mini-batch"
        except KfacError:
            raise
        except Exception as error:  # the model's own: it does not take a part of a mini-batch
            return True, f"the model does not run on a part of a mini-batch ({type(error).__name__})"
        return False, ""

    def _mixed(self, inputs: Any, n: int) -> bool:
        """Whether half of the cases have other outputs beside other cases: each half in turn beside copies of itself.

        Copies, and for floating-point inputs copies that are moved, keep the values in the data's range.
        """
        if n == 1:
            inputs, n = repeat_cases(inputs, 2), 2
        z = self._z(inputs)
        half = n // 2
        for kept in (slice(0, half), slice(n - half, n)):
            beside = self._z(map_nest(lambda x, kept=kept: _beside_copies(x, kept, half), inputs))  # type: ignore[misc]
            if not equal(beside[kept], z[kept]):
                return True
        return False

    def _same_in_parts(self, z: Tensor, n: int) -> bool:
        bounds = [0, n // 2, n]
        parts = [self._z(slice_cases(self._inputs, bounds[i], bounds[i + 1])) for i in range(2)]
        return close(torch.cat(parts), z)

    # --- derivatives ------------------------------------------------------------------------------------------------

    def _vector(self, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z.device, z.dtype)

    def _gradients(self, chunk: Chunk, v: Tensor) -> tuple[dict[str, Tensor], frozenset[int], frozenset[int]]:
        """J^T v, the blocks whose rows do not account for it, and those whose rows of a case all get one g."""
        if not chunk.z.requires_grad:
            raise UnsupportedModelError(
                "the model's outputs depend on none of its trainable parameters; check that its forward pass does not "
                "run under no_grad or detach its outputs"
            )
        leaves = list(self._probe.values())
        edges = [call.edge for calls in chunk.calls for call in calls]
        with self._again():  # with the same parameters, draws and buffers, should it run a checkpointed part again
            found = within(self._model, self._probe, lambda: pulled_whole(chunk.z, [*leaves, *edges], v))
        whole = {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(self._probe.items(), found, strict=False)
        }
        rest = iter(found[len(leaves) :])
        outside, pooled = set(), set()
        for index, (block, calls) in enumerate(zip(self._blocks, chunk.calls, strict=True)):
            arrived = [next(rest) for _ in calls]
            if not block.users:
                continue
            wanted = block.view(lambda parameter: whole[self._names[parameter]])
            told = explained(block, calls, arrived)
            # As one vector: a part of it may be zero but for rounding, as that of a bias before a norm of the batch is.
            if not close(as_vector(told), as_vector(wanted), loose=True):
                outside.add(index)
            elif block.info.kind == "kron" and all_equal(calls, arrived, chunk.z.shape[0]):
                pooled.add(index)
        return whole, frozenset(outside), frozenset(pooled)

    def _axes(self, chunk: Chunk, v: Tensor) -> dict[int, int | None]:
        """Blocks whose outputs do not have the cases first: what is not zero tells where g of half of the cases is."""
        n, edges = chunk.z.shape[0], [call.edge for calls in chunk.calls for call in calls]
        if n == 1 or not chunk.z.requires_grad or not edges:
            return {}
        half = n // 2
        first = torch.cat([v[:half], torch.zeros_like(v[half:])])
        with self._again():
            found = iter(within(self._model, self._probe, lambda: pulled_whole(chunk.z, edges, first)))
        axes: dict[int, int | None] = {}
        for index, calls in enumerate(chunk.calls):
            own = {_axis(next(found), n, half) for _ in calls}
            if own - {0}:
                axes[index] = own.pop() if len(own) == 1 else None
        return axes

    def _way(self, z: Tensor, v: Tensor, gradients: Mapping[str, Tensor], foreign: list[str]) -> tuple[Way, str]:
        """Forward mode if it is right, else double backward if that is: <v, J w> must be <J^T v, w>."""
        w = self._direction()
        right = sum(float((gradients[name].double() * w[name].double()).sum()) for name in w)
        suspects = f" (operations that are not torch's: {', '.join(foreign)})" if foreign else ""
        reasons: list[str] = []
        ways: tuple[tuple[Way, Callable[[], Tensor]], ...] = (
            ("forward", lambda: forward_mode(self._model, self._fresh(self._inputs), self._probe, w, self._output)),
            (
                "double",
                lambda: double_backward(self._model, self._fresh(self._inputs), self._probe, [w], self._output)[0],
            ),
        )
        for way, product in ways:
            try:
                with self._again():
                    Jw = product()
            except KfacError:
                raise
            except (RuntimeError, ValueError, AttributeError, TypeError) as error:  # a reason that is told
                reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                continue
            if not bool(torch.isfinite(Jw).all()):  # a later mini-batch will show it
                return way, "; ".join(reasons)
            left = float((v.double() * Jw.double()).sum())
            slack = _slack(z.dtype) * float(v.double().norm() * Jw.double().norm()) + 1e-3 * abs(right) * _rough(
                z.dtype
            )
            if abs(left - right) <= max(slack, torch.finfo(z.dtype).tiny):
                return way, "; ".join(reasons)
            reasons.append(f"an operation loses its {'tangent' if way == 'forward' else 'second derivative'}{suspects}")
        return "none", "; ".join(reasons) + ("" if "not torch's" in "".join(reasons) else suspects)

    def _direction(self) -> dict[str, Tensor]:
        """A random direction, every parameter by its scale; only entries that blocks have."""
        generator = torch.Generator().manual_seed(2)
        matrices = []
        for block in self._blocks:
            scale = torch.stack([part.square().mean() for part in block.views() if part.numel()]).mean().sqrt()
            scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
            noise = torch.randn(block.info.shape, generator=generator, dtype=torch.float32)
            matrices.append(noise.to(self._like.device, self._like.dtype) * scale)
        return tangents_of(self._blocks, self._names, matrices)


def _axis(g: Tensor | None, n: int, half: int) -> int | None:
    """Which dimension has the cases, if g is that of the first half of them: the first unless the numbers deny it."""
    if g is None or not bool(g.any()):
        return 0
    sizes = [dim for dim in (0, 1) if dim < g.dim() - (dim > 0) and g.shape[dim] == n]
    if not sizes:
        return 0  # its length says it
    return next((dim for dim in sizes if not bool(g.narrow(dim, half, n - half).any())), None)


def _beside_copies(x: Tensor, kept: slice, half: int) -> Tensor:
    """The kept cases as they are, the others copies of them, moved where they are numbers."""
    n = x.shape[0]
    copies = x[kept].repeat(-(-n // half), *[1] * (x.dim() - 1))[:n]
    if x.is_floating_point():
        copies = copies * 1.25 + 0.0625
    copies[kept] = x[kept]
    return copies


def _slack(dtype: torch.dtype) -> float:
    return 100.0 * torch.finfo(dtype).eps


def _rough(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
