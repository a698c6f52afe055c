"""``unsupported = "error"``: whatever is not a net of Linear layers, each called once on one row a case, is refused.

Found out on the first mini-batch, by name. Also what the block-tridiagonal form asks of a model: a chain of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.nest import cases_of, slice_cases
from kfacore.network import linear
from kfacore.network.blocks import ModelBlock
from kfacore.network.capture import Chunk, as_written, first_argument
from kfacore.network.pairs import nearest

__all__ = ["StrictChecks", "check_cases", "check_chain", "check_gradient"]

_PROBE_CASES = 16

_TRIES = 3
"""Mini-batches in which the checks are made as long as they come to nothing: with an output layer that starts at zero
they cannot see what lies below it, and one that stays dead must not cost every step."""


class StrictChecks:
    """The checks of one model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checked: tuple[bool, ...] | None = None
        self._tries = 0
        self._several = False

    @contextmanager
    def rows_only(self, layers: Sequence[ModelBlock]) -> Iterator[None]:
        """While it lasts, a layer must get one row a case, and be called at most once."""
        seen: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                linear.check_rows(name, first_argument(args, kwargs))
                if name in seen:
                    raise UnsupportedModelError(
                        f"{name}: used twice in one forward pass; shared layers cannot be preconditioned. "
                        "Give each use a module of its own"
                    )
                seen.add(name)

            return check

        handles = [layer.module.register_forward_pre_hook(hook(layer.info.name), with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_calls(self, layers: Sequence[ModelBlock], chunk: Chunk, *, ordered: bool) -> None:
        """Each layer must be called, always in the same order.

        Raises:
            UnsupportedModelError: The message names the layer.
        """
        for layer, calls in zip(layers, chunk.calls, strict=True):
            if not calls:
                raise UnsupportedModelError(
                    f"{layer.info.name}: not called in the forward pass, so nothing is known of its curvature. "
                    "Call the module itself (not only its weight), or freeze it with requires_grad_(False)"
                )
        if ordered and chunk.order != list(range(len(layers))):
            first = next(b for a, b in enumerate(chunk.order) if a != b)
            raise UnsupportedModelError(
                f"{layers[first].info.name}: the order of the layers changed between forward passes"
            )

    def due(self, cases: int) -> bool:
        """Whether the model is to be checked on this mini-batch.

        For the first time, when some module was switched between train and eval, and when there are several cases for
        the first time: one cannot show that cases are mixed.
        """
        modes = tuple(module.training for module in self._model.modules())
        if self._checked != modes or (cases > 1 and not self._several):
            self._checked, self._tries = modes, _TRIES
        return self._tries > 0

    def check(self, inputs: Any, chunk: Chunk, layers: Sequence[ModelBlock], cases: int, *, chain: bool) -> None:
        """Refuse what would be silently wrong."""
        with as_written(self._model):
            alone = check_cases(self._model, inputs)
        whole = check_gradient(layers, chunk)
        if chain:
            check_chain(layers, chunk)
        self._several = self._several or cases > 1
        self._tries = 0 if alone and whole and cases > 1 else self._tries - 1


def require_outputs(z: Any, cases: int) -> Tensor:
    """One row a case.

    Raises:
        UnsupportedModelError: The message says what was found.
    """
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[0] != cases:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UnsupportedModelError(f"the model must return outputs of shape ({cases}, outputs), found {found}")
    return z


def check_chain(layers: Sequence[ModelBlock], chunk: Chunk) -> None:
    """Each layer must feed the next one and nothing else, as the block-tridiagonal form assumes.

    Walks the autograd graph from each layer's input (and from z) back to the layers it depends on directly.

    Raises:
        UnsupportedModelError: The message names the layer with several or skipped parents.
    """
    calls = [each[0] for each in chunk.calls]
    owner = {call.edge.node: i for i, call in enumerate(calls)}
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        above = [following for following, _ in call.edge.node.next_functions]
        _require_parent(layer.info.name, nearest(above, owner), i - 1, layers)
    _require_parent("the model's output", nearest([chunk.z.grad_fn], owner), len(layers) - 1, layers)


def _require_parent(name: str, found: set[int], wanted: int, layers: Sequence[ModelBlock]) -> None:
    if found == ({wanted} if wanted >= 0 else set()):
        return
    names = ", ".join(layers[i].info.name for i in sorted(found)) or "no layer"
    want = layers[wanted].info.name if wanted >= 0 else "no layer"
    raise UnsupportedModelError(
        f"{name}: depends directly on {names}, but in a chain it would depend on {want} alone; "
        "this approximation needs a chain of layers: use approx = 'blockdiag'"
    )


def check_gradient(layers: Sequence[ModelBlock], chunk: Chunk) -> bool:
    """sum of g abar^T must be the whole derivative by the weights: a weight used elsewhere would add to it.

    Returns:
        Whether the numbers could show it: False if some layer's g is zero, or not finite.

    Raises:
        UnsupportedModelError: The message names the layer.
    """
    v = torch.ones_like(chunk.z)
    calls = [each[0] for each in chunk.calls]
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    whole = list(torch.autograd.grad(chunk.z, parameters, v, retain_graph=True, allow_unused=True))
    gradients = torch.autograd.grad(chunk.z, [call.edge for call in calls], v, retain_graph=True, allow_unused=True)
    shown = True
    for layer, call, g in zip(layers, calls, gradients, strict=True):
        if g is None:
            raise UnsupportedModelError(
                f"{layer.info.name}: the model's output does not depend on it; remove it or freeze it with "
                "requires_grad_(False)"
            )
        block = torch.empty(layer.info.shape, dtype=g.dtype, device=g.device)
        linear.add_gradient(call.rows, g, block, accumulate=False)
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
        f"{name} mixes examples or draws random numbers in training mode (as batch norm and dropout do), which makes "
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
