"""Initialisation of nets with convolutions, attention and norms, from one generator.

Sources: He et al., "Delving deep into rectifiers", 2015 (convolutions and layers before a ReLU); Radford et al.,
"Language models are unsupervised multitask learners", 2019 (transformers: a standard deviation of 0.02, smaller by
1/sqrt(2 L) for the layers that end one of the 2 L residual branches).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

__all__ = ["he_init", "normal_init"]


@torch.no_grad()
def normal_init(
    model: nn.Module, generator: torch.Generator, *, deviation: float = 0.02, smaller: Collection[nn.Module] = ()
) -> None:
    """Weights from N(0, deviation^2), biases 0, norms the identity.

    Args:
        model: Its linear layers, convolutions, embeddings and norms are filled in place, in order of registration, and
            so are parameters that belong to none of them.
        generator: A CPU generator.
        deviation: Standard deviation of weights.
        smaller: Layers that end a residual branch; theirs is divided by the root of their number.
    """
    branches = set(smaller)
    for module in model.modules():
        scale = deviation / math.sqrt(len(branches)) if module in branches else deviation
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:  # the weight of a norm
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, scale, generator=generator)


@torch.no_grad()
def he_init(model: nn.Module, generator: torch.Generator) -> None:
    """Weights from N(0, 2 / fan_in), biases 0, norms the identity; the last linear layer from N(0, 1 / fan_in).

    Args:
        model: Its layers are filled in place, in order of registration.
        generator: A CPU generator.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                gain = 1.0 if module is layers[-1] else 2.0
                parameter.normal_(0.0, math.sqrt(gain / parameter[0].numel()), generator=generator)
