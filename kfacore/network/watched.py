"""The parameters that an optimizer found in a model: their names, and whether they are still the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kfacore.errors import UnsupportedModelError
from kfacore.nest import tensors_of
from kfacore.network.draws import Draws
from kfacore.network.state import ModelState

__all__ = ["Watched", "materialise"]


class Watched:
    """What a model was made of.

    Args:
        model: The model as it is now.

    Attributes:
        named: The trainable parameters by qualified name.
        names: Their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.names: dict[nn.Parameter, str] = {each: name for name, each in self.named.items()}
        self._parameters = [
            (
                f"{name}.{key}" if name else key,
                module,
                key,
                each,
                each.requires_grad,
                None if is_lazy(each) else each.shape,
            )
            for name, module in model.named_modules()
            for key, each in module._parameters.items()
            if each is not None
        ]
        self._modules = [
            (f"{name}.{key}" if name else key, module, key, child)
            for name, module in model.named_modules()
            for key, child in module._modules.items()
            if child is not None
        ]

    def changed(self) -> list[str]:
        """Parameters that were frozen, unfrozen, reshaped or replaced since then, and modules, one line each."""
        found = []
        for name, module, key, parameter, trainable, shape in self._parameters:
            now = module._parameters.get(key)
            if now is not parameter:
                found.append(f"{name} was replaced by another parameter")
            elif shape is not None and parameter.shape != shape:
                found.append(f"{name} got the shape {tuple(parameter.shape)} in place of {tuple(shape)}")
            elif parameter.requires_grad != trainable:
                done = "frozen" if trainable else "unfrozen"
                found.append(f"{name} was {done} (requires_grad = {parameter.requires_grad})")
        found += [
            f"{name} was replaced by another module"
            for name, parent, key, module in self._modules
            if parent._modules.get(key) is not module
        ]
        return found

    def require(self) -> None:
        """Nothing may have changed.

        Raises:
            UnsupportedModelError: Something did; the message has the first of it.
        """
        changed = self.changed()
        if changed:
            raise UnsupportedModelError(
                f"{changed[0]} after the optimizer was built, "
                "which keeps statistics of the parameters it found; build the optimizer again"
            )


def materialise(model: nn.Module, inputs: Any) -> None:
    """One throw-away pass that gives lazy modules their shapes; draws and buffers are put back."""
    device = next((tensor.device for tensor in tensors_of(inputs)), torch.device("cpu"))
    draws = Draws(model, device)
    draws.look()
    before, state = draws.state(), ModelState(model)
    fresh = {
        id(module)
        for module in model.modules()
        if any(each is not None and is_lazy(each) for each in module._buffers.values())
    }
    with torch.no_grad(), draws.replaying(before):
        model(inputs)
    state.put_back()
    for module in model.modules():
        reset = getattr(module, "reset_running_stats", None)
        if id(module) in fresh and callable(reset):
            reset()
