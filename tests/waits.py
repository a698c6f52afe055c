"""Watches that see what would wait for a device, and the devices that tests run on.

Two modes watch a step: one sees every operator, also those inside autograd, the other what Python asks of a tensor.
On CUDA, torch's own debug mode turns every wait into an error as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
"""A test that has "cuda" among its parameters is marked so: see conftest.py."""

WAITING = {
    "_local_scalar_dense",  # item, float, int, bool
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "lift_fresh",  # torch.tensor(...) of host numbers: a copy that waits on an accelerator
}
"""Operators that read the device back, or copy from unpinned host memory."""

SILENT = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu}
"""What Python may ask of a CPU tensor without any operator being called."""


class Operators(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            self.seen[name] += 1
        elif _crosses(name, args, kwargs):
            self.seen["copy between devices"] += 1
        elif name in ("index", "index_put", "index_put_") and any(_is_mask(i) for i in args[1]):
            self.seen["boolean index"] += 1
        return func(*args, **kwargs)


def _crosses(name: str, args: Any, kwargs: Any) -> bool:
    if name == "_to_copy":
        return kwargs.get("device") not in (None, args[0].device)
    return name == "copy_" and args[0].device != args[1].device


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class Python(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SILENT:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watch() -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    with Python(seen), Operators(seen):
        yield seen


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    with ExitStack() as stack:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield
