"""Nests of tensors (tuples, lists, dicts) whose first dimension is the case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError

__all__ = ["cases_of", "map_nest", "repeat_cases", "slice_cases", "tensors_of"]


def tensors_of(nest: Any) -> Iterator[Tensor]:
    """All tensors of a nest, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, dict):
        for value in nest.values():
            yield from tensors_of(value)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from tensors_of(value)


def map_nest(function: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest with the function applied to every tensor; other leaves are kept."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, dict):
        return {key: map_nest(function, value) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_nest(function, value) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(map_nest(function, value) for value in nest)
    return nest


def cases_of(nest: Any) -> int:
    """Number of cases: the first dimension that all tensors of the nest share.

    Raises:
        DataError: There is no tensor, no first dimension, no case, or the tensors disagree.
    """
    sizes = {tuple(tensor.shape[:1]) for tensor in tensors_of(nest)}
    if not sizes:
        raise DataError(f"inputs: no tensor found, but {type(nest).__name__}; convert arrays with torch.as_tensor(x)")
    if len(sizes) != 1 or () in sizes:
        found = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(nest))
        raise DataError(f"inputs: every tensor's first dimension must count the examples; found shapes {found}")
    (count,) = sizes.pop()
    if count == 0:
        raise DataError("inputs: the mini-batch has no examples")
    return count


def slice_cases(nest: Any, start: int, stop: int) -> Any:
    """Views of the cases start..stop-1."""
    return map_nest(lambda tensor: tensor[start:stop], nest)


def repeat_cases(nest: Any, times: int) -> Any:
    """All cases, then all cases again, and so on."""
    if times == 1:
        return nest
    return map_nest(lambda tensor: torch.cat([tensor] * times), nest)
