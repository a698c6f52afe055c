"""A model's forward pass with other tensors in place of its parameters.

`torch.func.functional_call` puts parameters back in the order in which it took them. A module that the model has under
several names is then left with the tensors that stood in for its parameters, and nobody is told. So each parameter is
replaced here once a module and key, wherever the model has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["call_with"]


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Run the model while these stand for its parameters; tied ones are replaced everywhere.

    Args:
        model: The model; as it was afterwards.
        tensors: By qualified name, one of each parameter's is enough.
        args: What the model is called with.
    """
    wanted = {id(model.get_parameter(name)): tensor for name, tensor in tensors.items()}
    everywhere = {
        f"{prefix}.{key}" if prefix else key: wanted[id(parameter)]
        for prefix, module in model.named_modules()  # each module once
        for key, parameter in module._parameters.items()
        if id(parameter) in wanted
    }
    return functional_call(model, everywhere, args, tie_weights=False)
