"""What would make a linearization silently wrong is found out on the first mini-batch and refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.nest import cases_of, slice_cases
from kfacore.network.rules import Layer

if TYPE_CHECKING:
    from kfacore.network.linearization import Chunk

__all__ = ["check_calls", "check_cases", "check_chain", "check_gradient"]

_PROBE_CASES = 16


def check_calls(layers: Sequence[Layer], called: Sequence[Layer], z: Any, cases: int, *, ordered: bool) -> list[Layer]:
    """Each layer must be called exactly once, always in the same order, and z must have one row a case.

    Returns:
        The layers in execution order.

    Raises:
        UnsupportedModelError: The message names the layer.
    """
    seen: set[int] = set()
    for layer in called:
        if id(layer) in seen:
            raise UnsupportedModelError(
                f"{layer.info.name}: used twice in one forward pass; shared layers cannot be preconditioned. "
                "Give each use a module of its own"
            )
        seen.add(id(layer))
    for layer in layers:
        if id(layer) not in seen:
            raise UnsupportedModelError(
                f"{layer.info.name}: not called in the forward pass, so nothing is known of its curvature. "
                "Call the module itself (not only its weight), or freeze it with requires_grad_(False)"
            )
    if ordered and list(called) != list(layers):
        first = next(b for a, b in zip(layers, called, strict=True) if a is not b)
        raise UnsupportedModelError(f"{first.info.name}: the order of the layers changed between forward passes")
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[0] != cases:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UnsupportedModelError(f"the model must return outputs of shape ({cases}, outputs), found {found}")
    return list(called)


def check_chain(layers: Sequence[Layer], chunk: Chunk) -> None:
    """Each layer must feed the next one and nothing else, as the block-tridiagonal form assumes.

    Walks the autograd graph from each layer's input (and from z) back to the layers it depends on directly.

    Raises:
        UnsupportedModelError: The message names the layer with several or skipped parents.
    """
    owner = {call.edge.node: i for i, call in enumerate(chunk.calls)}

    def parents(roots: list[Any]) -> set[int]:
        found: set[int] = set()
        stack, seen = list(roots), set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in owner:
                found.add(owner[node])
            else:
                stack.extend(following for following, _ in node.next_functions)
        return found

    for i, (layer, call) in enumerate(zip(layers, chunk.calls, strict=True)):
        above = [following for following, _ in call.edge.node.next_functions]
        _require_parent(layer.info.name, parents(above), i - 1, layers)
    _require_parent("the model's output", parents([chunk.z.grad_fn]), len(layers) - 1, layers)


def _require_parent(name: str, found: set[int], wanted: int, layers: Sequence[Layer]) -> None:
    if found == ({wanted} if wanted >= 0 else set()):
        return
    names = ", ".join(layers[i].info.name for i in sorted(found)) or "no layer"
    want = layers[wanted].info.name if wanted >= 0 else "no layer"
    raise UnsupportedModelError(
        f"{name}: depends directly on {names}, but in a chain it would depend on {want} alone; "
        "this approximation needs a chain of layers: use approx = 'blockdiag'"
    )


def check_gradient(layers: Sequence[Layer], chunk: Chunk) -> bool:
    """sum of g abar^T must be the whole derivative by the weights: a weight used elsewhere would add to it.

    Returns:
        Whether the numbers could show it: False if some layer's g is zero, or not finite.

    Raises:
        UnsupportedModelError: The message names the layer.
    """
    v = torch.ones_like(chunk.z)
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    whole = list(torch.autograd.grad(chunk.z, parameters, v, retain_graph=True, allow_unused=True))
    gradients = torch.autograd.grad(
        chunk.z, [call.edge for call in chunk.calls], v, retain_graph=True, allow_unused=True
    )
    shown = True
    for layer, call, g in zip(layers, chunk.calls, gradients, strict=True):
        if g is None:
            raise UnsupportedModelError(
                f"{layer.info.name}: the model's output does not depend on it; remove it or freeze it with "
                "requires_grad_(False)"
            )
        block = torch.empty(layer.info.shape, dtype=g.dtype, device=g.device)
        layer.rule.gradient(call.rows, g, block, accumulate=False)
        largest = float(g.abs().max())
        shown = shown and math.isfinite(largest) and largest > 0.0
        for part in layer.split(block):
            full = whole.pop(0)
            if full is None or not _close(full, part):
                raise UnsupportedModelError(
                    f"{layer.info.name}: its weights are used outside its own forward pass (tied or functional use), "
                    "which cannot be preconditioned. Use the module alone"
                )
    return shown


def check_cases(model: nn.Module, inputs: Any) -> bool:
    """The outputs of a case must depend on that case alone and on nothing random.

    Runs a few of the first cases with and without others, and compares.

    Returns:
        Whether the outputs could show it: False if they are not finite.

    Raises:
        UnsupportedModelError: The message names the first module that mixes cases or draws random numbers.
    """
    cases = min(_PROBE_CASES, cases_of(inputs))
    count = max(1, cases // 2)
    with torch.no_grad():
        both, alone = model(slice_cases(inputs, 0, cases)), model(slice_cases(inputs, 0, count))
    if _close(both[:count], alone):
        return bool(torch.isfinite(both).all())
    name = _first_difference(model, inputs, count)
    raise UnsupportedModelError(
        f"{name} mixes cases or draws random numbers in training mode (as batch norm and dropout do), which makes "
        "the quadratic model and rho wrong. Put it in eval() mode or remove it"
    )


def _first_difference(model: nn.Module, inputs: Any, count: int) -> str:
    """Name of the first leaf module whose outputs for the same cases differ between two passes."""
    both = _leaf_outputs(model, slice_cases(inputs, 0, min(2 * count, cases_of(inputs))))
    alone = _leaf_outputs(model, slice_cases(inputs, 0, count))
    for (name, first), (_, second) in zip(both, alone, strict=False):
        if isinstance(first, Tensor) and isinstance(second, Tensor) and not _close(first[:count], second[:count]):
            return name
    return type(model).__name__


def _leaf_outputs(model: nn.Module, inputs: Any) -> list[tuple[str, Any]]:
    outputs: list[tuple[str, Any]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, _args, out: outputs.append((f"{name} ({type(module).__name__})", out))

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return outputs


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal up to rounding: products over other numbers of rows may be summed in another order."""
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        return True  # not this check's business: the step reports what is not finite
    scale = max(float(y.abs().max()), float(x.abs().max()))
    eps = torch.finfo(x.dtype).eps
    return float((x - y).abs().max()) <= 3.0 * math.sqrt(eps) * scale + torch.finfo(x.dtype).tiny
