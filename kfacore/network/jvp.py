r"""J v: the derivative of the outputs along directions of the parameters, by three ways.

* Known products: the layers' outputs are taken from the forward pass, k directions go in one pass. For plain nets.
* Forward mode: the model runs once a direction on dual parameters.
* Double backward: J v = d/du (J^T u . v), where an operation has no forward derivative, or loses it without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfacore.nest import repeat_cases
from kfacore.network import linear
from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Call, Chunk
from kfacore.network.outputs import Output, read_output
from kfacore.network.standing import call_with

__all__ = [
    "Tangents",
    "double_backward",
    "forward_mode",
    "known_products",
    "tangents_of",
    "within",
]

R = TypeVar("R")

Tangents = Mapping[str, Tensor]
"""A direction of the parameters, by qualified name."""


def tangents_of(
    blocks: Sequence[ModelBlock], names: Mapping[nn.Parameter, str], matrices: Sequence[Tensor]
) -> dict[str, Tensor]:
    """A direction given block by block, in the shapes of the parameters; entries that no block has do not move."""
    found: dict[nn.Parameter, Tensor] = {}

    def of(parameter: nn.Parameter) -> Tensor:
        if parameter not in found:
            found[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return found[parameter].detach()

    for block, matrix in zip(blocks, matrices, strict=True):
        for view, part in zip(block.view(of), block.split(matrix), strict=True):
            view.copy_(part)
    return {names[parameter]: tensor for parameter, tensor in found.items()}


class _Within(nn.Module):
    """Runs any work while the model inside has other parameters."""

    def __init__(self, model: nn.Module, work: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self._work = work

    def forward(self) -> Any:
        return self._work()


def within(model: nn.Module, parameters: Mapping[str, Tensor], work: Callable[[], R]) -> R:
    """Do something while these stand for the model's parameters: a backward pass may run a checkpointed part again."""
    moved = {f"model.{name}": parameter for name, parameter in parameters.items()}
    return cast("R", call_with(_Within(model, work), moved, ()))


def forward_mode(
    model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor], tangents: Tangents, output: Output
) -> Tensor:  # (n, ..., o)
    """J v by one pass on dual parameters."""
    load_forward_mode()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fwd.dual_level():
        duals = {
            name: fwd.make_dual(parameters[name].detach(), tangent)  # type: ignore[no-untyped-call]
            for name, tangent in tangents.items()
        }
        z = read_output(call_with(model, {**parameters, **duals}, (inputs,)), output)
        primal, tangent = unpack(z)
        return torch.zeros_like(primal) if tangent is None else tangent.clone()


def double_backward(
    model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor], directions: Sequence[Tangents], output: Output
) -> Tensor:  # (k, n, ..., o)
    """J v as the derivative of J^T u by u, which is linear in u: its value does not matter."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}

    def products() -> Tensor:
        z = read_output(model(inputs), output)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(leaves.values()), u, create_graph=True, allow_unused=True)
        known = [(name, g) for name, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad]
        found = []
        for tangents in directions:
            used = [(g, tangents[name]) for name, g in known if name in tangents]
            g = None
            if used:
                (g,) = torch.autograd.grad(
                    [each for each, _ in used], u, [v for _, v in used], retain_graph=True, allow_unused=True
                )
            found.append(torch.zeros_like(u) if g is None else g.detach())
        return torch.stack(found).detach()

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return within(model, leaves, products)


def known_products(
    model: nn.Module,
    inputs: Any,  # of the first n cases
    blocks: Sequence[ModelBlock],
    chunks: Sequence[Chunk],
    directions: Sequence[Sequence[Tensor]],
    n: int,
    output: Output,
) -> tuple[Tensor, Tensor | None]:  # (k n, o), twice
    """Outputs and tangents of k copies of the cases, each moving in its own direction, in one pass."""
    load_forward_mode()
    with torch.no_grad(), fwd.dual_level(), _patched(blocks, chunks, directions, n):
        return unpack(read_output(model(repeat_cases(inputs, len(directions))), output))


@contextmanager
def _patched(
    blocks: Sequence[ModelBlock], chunks: Sequence[Chunk], directions: Sequence[Sequence[Tensor]], n: int
) -> Iterator[None]:
    """Replace each layer's forward by one that takes the known output and computes its tangent."""
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for i, block in enumerate(blocks):
            calls = [chunk.calls[i][0] for chunk in chunks]
            # An instance attribute shadows the class's forward; hooks of the user still run around it.
            patched.append((block.module, block.module.__dict__.get("forward")))
            block.module.__dict__["forward"] = _tangent_forward(block, calls, [d[i] for d in directions], n)
        yield
    finally:
        for module, own in patched:
            if own is None:
                del module.__dict__["forward"]
            else:  # somebody else's wrapper
                module.__dict__["forward"] = own


def _tangent_forward(
    block: ModelBlock, calls: list[Call], matrices: list[Tensor], n: int
) -> Callable[[Tensor], Tensor]:
    known = not any(call.overwritten for call in calls)
    k = len(matrices)

    def forward(input: Tensor) -> Tensor:  # the name nn.Linear.forward has, for keyword calls
        x, dx = unpack(input)
        s = _first(_outputs, calls, n, k).to(calls[0].dtype) if known else linear.primal(block.module, x)
        tangent = linear.tangent(block.module, _first(Call.first_rows, calls, n), dx, matrices)
        return cast("Tensor", fwd.make_dual(s, tangent))  # type: ignore[no-untyped-call]  # torch has no types here

    return forward


@cache
def load_forward_mode() -> None:
    """Make torch load its forward-mode decompositions, which warns of a deprecated part of torch itself."""
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]  # torch has no types here


def unpack(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent."""
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
