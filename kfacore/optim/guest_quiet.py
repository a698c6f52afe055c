"""Keeps passes of a guest from whatever is the user's: hooks, buffers, generators, kept gradients.

Backward passes of a guest go through the user's own graph. Torch calls hooks that lie in it whoever asks for gradients;
those of modules and of parameters are kept still here. Those on activations, z too, and on nodes of the graph are not:
wrappers that gather parameters for a backward pass (FSDP) depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

__all__ = ["Quiet"]

_TORCHS: Any = module
"""Where torch looks up what binds hooks of modules to the graph, whenever a module with such hooks is called."""


class Quiet:
    """Hooks of modules that run in a watched pass keep still while the guest sends vectors back.

    Attributes:
        still: Whether they do now.
    """

    def __init__(self) -> None:
        self.still = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass whose modules' backward hooks, which torch binds to the graph in it, ask `still` first."""
        full: Any = _TORCHS.BackwardHook
        wrapped: Any = _TORCHS._WrappedHook
        quiet = self

        class Full(full):  # type: ignore[misc]  # an outer guest's, perhaps
            def __init__(self, module: nn.Module, hooks: Any, pre_hooks: Any) -> None:
                super().__init__(module, [quiet.asked(h) for h in hooks], [quiet.asked(h) for h in pre_hooks])

        class Wrapped(wrapped):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return None if quiet.still else super().__call__(*args, **kwargs)

        _TORCHS.BackwardHook, _TORCHS._WrappedHook = Full, Wrapped
        try:
            yield
        finally:
            _TORCHS.BackwardHook, _TORCHS._WrappedHook = full, wrapped

    def asked(self, hook: Any) -> Any:
        """The hook, that does nothing while they keep still."""

        def run(*args: Any) -> Any:
            return None if self.still else hook(*args)

        return run

    @contextmanager
    def passes(self, model: nn.Module, z: Tensor) -> Iterator[None]:
        """Backward passes from z: whatever is run again in them, as in checkpointed parts, leaves nothing behind.

        Args:
            model: The model, whose buffers are put back.
            z: Outputs, whose ``grad`` is put back if it is kept.
        """
        hooks: list[Any] = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
        kept = [dict(own) for own in hooks]
        own = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        buffers = [(*each, each[2].clone()) for each in own if not each[2].is_inference()]
        grad = z.grad if z.retains_grad else None
        devices = [z.device] if z.device.type == "cuda" else []
        for each in hooks:
            each.clear()
        self.still = True
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            self.still = False
            for each, before in zip(hooks, kept, strict=True):
                each.update(before)
            for m, name, b, value in buffers:
                m._buffers[name] = b
                b.data.copy_(value)  # as data, since a graph may have saved it, and batch norms move theirs unmarked
            if z.retains_grad:
                z.grad = grad
