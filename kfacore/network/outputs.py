"""What a model returned, read as outputs z of shape (n, ..., o)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kfacore.errors import UnsupportedModelError

__all__ = ["Output", "find_output", "read_output"]

Output = str | Callable[[Any], Tensor] | None
"""How z is found in what a model returns: a name, a function, or by itself."""

_NAMES = ("logits", "output", "out")


def read_output(found: Any, output: Output = None) -> Tensor:
    """Z with an axis of outputs: (n, ..., o); outputs (n,) are read as (n, 1). See `find_output`."""
    z = find_output(found, output)
    return z.unsqueeze(1) if z.dim() == 1 else z


def find_output(found: Any, output: Output = None) -> Tensor:
    """Z out of a tensor, a tuple, a dict, or an object with ``logits``.

    Args:
        found: What the model returned.
        output: The key or attribute that holds z, or a function that gives it. Left out: the tensor itself; of a
            dict ``logits``, ``output`` or ``out``; an attribute ``logits``; else the first tensor.

    Returns:
        (n, ..., o), or (n,).

    Raises:
        UnsupportedModelError: There is no such tensor, it is a single number, or not of floating point.
    """
    z = output(found) if callable(output) else _named(found, output) if output is not None else _first(found)
    if not isinstance(z, Tensor):
        where = f"output = {output!r}" if output is not None else "its result"
        raise UnsupportedModelError(
            f"the model must return a tensor of outputs, found {_shown(z if output is not None else found)} as "
            f"{where}; say where it is with output = a name or a function"
        )
    if z.dim() == 0:
        raise UnsupportedModelError(
            "the model returned a single number; it must return its outputs, one row an example: the likelihood makes "
            "the loss of them"
        )
    if not z.is_floating_point():
        raise UnsupportedModelError(f"the model's outputs must be floating-point numbers, found {z.dtype}")
    return z


def _named(found: Any, name: str) -> Any:
    return found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)


def _first(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found
    for name in _NAMES if isinstance(found, Mapping) else ("logits",):
        z = _named(found, name)
        if isinstance(z, Tensor):
            return z
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _shown(found: Any) -> str:
    return type(found).__name__
