"""Which generators a forward pass draws from, and how its draws are made again.

Asked of the generators: whether their state moved. Torch's own, Python's and NumPy's global ones are always looked at.
Generators that modules hold are found in their attributes, any other `torch.Generator` when an operation is given it.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Draws", "Watch"]

_OWN = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""


@dataclass(frozen=True)
class Source:
    """A generator whose state can be read and set."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


class Draws:
    """The generators that a model may draw from.

    Args:
        model: The model, whose modules are searched for generators.
        device: Where its parameters are.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sources: dict[object, Source] = {
            "cpu": Source("torch's generator", torch.get_rng_state, torch.set_rng_state),
            "python": Source("Python's random", random.getstate, random.setstate),
        }
        if device.type not in ("cpu", "meta"):
            own = torch.get_device_module(device)
            index = device.index if device.index is not None else own.current_device()
            self._sources["device"] = Source(
                f"torch's generator on {device}",
                partial(own.get_rng_state, index),
                lambda state: own.set_rng_state(state, index),
            )

    def __getstate__(self) -> dict[str, Any]:
        """Generators are looked for again in a copy: they are known by identity."""
        return {"model": self._model, "device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["device"])  # type: ignore[misc]  # nothing else could be kept
        self.look()

    def state(self, *, least: bool = False) -> dict[object, Any]:
        """The state of every generator; of torch's own alone if told so, which costs next to nothing."""
        known = ("cpu", "device") if least else list(self._sources)
        return {key: self._sources[key].get() for key in known if key in self._sources}

    def moved(self, before: Mapping[object, Any]) -> list[str]:
        """Names of the generators whose state is another one now."""
        return [self._sources[key].name for key, state in before.items() if not _same(self._sources[key].get(), state)]

    def restore(self, states: Mapping[object, Any]) -> None:
        """Set the generators back."""
        for key, state in states.items():
            self._sources[key].set(state)

    @contextmanager
    def replaying(self, states: Mapping[object, Any]) -> Iterator[None]:
        """Draw from these states on; afterwards the generators are where they were."""
        now = {key: self._sources[key].get() for key in states}
        self.restore(states)
        try:
            yield
        finally:
            self.restore(now)

    def meet(self, generator: torch.Generator) -> bool:
        """Take up a generator; whether it is a new one."""
        if id(generator) in self._sources or generator is torch.default_generator:
            return False
        self._sources[id(generator)] = _torch_source("a torch.Generator of the model", generator)
        return True

    def look(self) -> None:
        """Take up NumPy's global generator, and those that the modules hold."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and "numpy" not in self._sources:
            self._sources["numpy"] = Source("NumPy's random", numpy.random.get_state, numpy.random.set_state)
        for name, module in self._model.named_modules():
            for key, value in module.__dict__.items():
                if key in _OWN:
                    continue
                for held in _members(value):
                    source = _source_of(f"{name}.{key}" if name else key, held, numpy)
                    if source is not None:
                        self._sources.setdefault(id(held), source)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Sees every operation of a forward pass: the generators it is given, and operations that are not torch's own.

    Attributes:
        first: State of each newly met generator before its first use.
        foreign: Names of operations of other libraries.
    """

    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._draws = draws
        self.first: dict[object, Any] = {}
        self.foreign: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look, then run it."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator) and self._draws.meet(value):
                self.first[id(value)] = value.get_state()
        if getattr(func, "namespace", "aten") not in ("aten", "prim", "prims", "profiler"):
            self.foreign.append(str(func))
        return func(*args, **kwargs)


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _torch_source(name: str, generator: torch.Generator) -> Source:
    return Source(name, generator.get_state, generator.set_state)


def _source_of(name: str, held: Any, numpy: Any) -> Source | None:
    if isinstance(held, torch.Generator):
        return _torch_source(name, held)
    if isinstance(held, random.Random):
        return Source(name, held.getstate, held.setstate)
    if numpy is not None and isinstance(held, numpy.random.RandomState):
        return Source(name, held.get_state, held.set_state)
    if numpy is not None and isinstance(held, numpy.random.Generator):
        bits = held.bit_generator
        return Source(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal states: tensors, arrays, and nests of them."""
    if isinstance(a, Tensor):  # bytes on the host, read without an operation of torch
        return _bytes(a) == _bytes(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return bool(a == b)


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.nbytes)
