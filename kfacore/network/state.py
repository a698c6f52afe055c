"""What a forward pass leaves behind in a model: buffers and plain attributes, kept so that a pass can be run again.

A step moves them once, in its first forward pass. Every further pass of the same step works on clones of what they
were before it, and the model's own are put back as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModelState"]

_PLAIN = (Tensor, int, float, str, bool, type(None))
_Store = MutableMapping[str, Any]


class ModelState:
    """Buffers, tensors and numbers that a model's modules hold at one moment, parameters aside.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stores = [_held(module) for module in model.modules()]
        self._kept = [
            (
                buffers,
                attributes,
                _copies(buffers),
                _copies(attributes),
                _references(buffers),
                _references(attributes),
            )
            for buffers, attributes in self._stores
        ]

    def moved_buffers(self) -> bool:
        """Whether a buffer has another value now."""
        return any(_differs(buffers, kept) for buffers, _, kept, *_ in self._kept)

    def moved_attributes(self) -> bool:
        """Whether a tensor or number that is a plain attribute of a module has another value now."""
        return any(_differs(attributes, kept) for _, attributes, _, kept, *_ in self._kept)

    def put_back(self) -> None:
        """Give the model the tensors that were kept, with their values; lazy ones keep what they have become."""
        for (buffers, attributes), kept in zip(self._stores, self._kept, strict=True):
            for store, references, copies in ((buffers, kept[4], kept[2]), (attributes, kept[5], kept[3])):
                for key, value in references.items():
                    if isinstance(value, Tensor) and value is not copies[key]:
                        with torch.no_grad():
                            value.copy_(copies[key])
                        store[key] = value

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Run on clones of what was kept; afterwards the model holds what it held before, the same objects."""
        now = [(_references(buffers), _references(attributes)) for buffers, attributes in self._stores]
        try:
            for buffers, attributes, kept_buffers, kept_attributes, *_ in self._kept:
                _install(buffers, {key: _clone(value) for key, value in kept_buffers.items()})
                _install(attributes, {key: _clone(value) for key, value in kept_attributes.items()})
            yield
        finally:
            for (buffers, attributes), (own_buffers, own_attributes) in zip(self._stores, now, strict=True):
                _install(buffers, own_buffers)
                _install(attributes, own_attributes)


def _held(module: nn.Module) -> tuple[_Store, _Store]:
    return module._buffers, module.__dict__


def _references(store: _Store) -> dict[str, Any]:
    return {key: value for key, value in store.items() if isinstance(value, _PLAIN)}


def _copies(store: _Store) -> dict[str, Any]:
    return {key: _clone(value) for key, value in _references(store).items()}


def _clone(value: Any) -> Any:
    if not isinstance(value, Tensor) or is_lazy(value):
        return value
    with torch.no_grad():
        return value.detach().clone()


def _install(store: _Store, values: dict[str, Any]) -> None:
    """Give the store these values; those of the kept kinds that it did not have are taken away."""
    for key in [key for key in _references(store) if key not in values]:
        del store[key]
    for key, value in values.items():
        store[key] = value


def _differs(store: _Store, kept: dict[str, Any]) -> bool:
    now = _references(store)
    return now.keys() != kept.keys() or any(not _equal(now[key], value) for key, value in kept.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b:
            return True
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return bool(torch.isclose(a, b, rtol=0.0, atol=0.0, equal_nan=True).all())
    return type(a) is type(b) and (a == b or a != a)
