"""Plain feed-forward nets and the sparse initialisation of the paper (method, section 6).

The nets end with their last `nn.Linear`: outputs are the natural parameters z, and the likelihood knows what they mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from kfacore.errors import ConfigError, nearest

__all__ = ["ACTIVATIONS", "autoencoder", "mlp", "sparse_init"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
"""Unit types by name."""


def mlp(sizes: Sequence[int], hidden: str = "tanh", linear: Collection[int] = ()) -> nn.Sequential:
    """A chain of linear layers with one kind of hidden unit.

    Args:
        sizes: Widths from the input to the output, (d_0, ..., d_L) with L >= 1.
        hidden: Unit type of the hidden layers, a key of `ACTIVATIONS`.
        linear: Indices into ``sizes`` of hidden layers that stay linear (the code layer of an autoencoder).

    Returns:
        ``nn.Sequential`` of `nn.Linear` and activations; nothing follows the last `nn.Linear`.

    Raises:
        ConfigError: Fewer than two sizes, a size below 1, an unknown unit type, or an index that is no hidden layer.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ConfigError(f"layer sizes {list(sizes)}: give at least an input and an output width, all 1 or more")
    if hidden not in ACTIVATIONS:
        raise ConfigError(f"unknown unit type '{hidden}'; {nearest(hidden, ACTIVATIONS)}")
    outside = [index for index in linear if not 1 <= index <= len(sizes) - 2]
    if outside:
        raise ConfigError(
            f"layer {outside[0]} cannot be the linear hidden layer: the hidden layers of sizes {list(sizes)} are "
            f"numbered 1 to {len(sizes) - 2}"
        )
    modules: list[nn.Module] = []
    last = len(sizes) - 1
    for index in range(1, last + 1):
        modules.append(nn.Linear(sizes[index - 1], sizes[index]))
        if index != last and index not in linear:
            modules.append(ACTIVATIONS[hidden]())
    return nn.Sequential(*modules)


def autoencoder(sizes: Sequence[int], hidden: str = "logistic") -> nn.Sequential:
    """A deep autoencoder whose middle layer, the code, is linear.

    Args:
        sizes: All widths, for example (784, 1000, 500, 250, 30, 250, 500, 1000, 784).
        hidden: Unit type of the other hidden layers, a key of `ACTIVATIONS`.

    Returns:
        As `mlp`.

    Raises:
        ConfigError: An even number of sizes, input and output of different width, or as `mlp`.
    """
    if len(sizes) < 3 or len(sizes) % 2 == 0 or sizes[0] != sizes[-1]:
        raise ConfigError(
            f"layer sizes {list(sizes)}: an autoencoder has an odd number of widths (3 or more), the code in the "
            "middle and the last equal to the first"
        )
    return mlp(sizes, hidden, linear=(len(sizes) // 2,))


@torch.no_grad()
def sparse_init(model: nn.Module, generator: torch.Generator, connections: int = 15) -> None:
    """Sparse initialisation of Martens (2010), as in the authors' program (method, section 6).

    Each unit gets ``connections`` incoming weights drawn from N(0, 1) at positions drawn with replacement (a position
    drawn twice keeps its last weight); all other weights and the biases are 0. For tanh units the weights are halved,
    halved again if the layer below is tanh, and biases are 0.5. A layer's unit type is the activation that follows
    its `nn.Linear` in the order of registration.

    Args:
        model: Its `nn.Linear` modules are filled in place, in order of registration.
        generator: A CPU generator; the draws do not depend on the model's dtype or device.
        connections: Draws for each unit.
    """
    below_is_tanh = False
    for layer, is_tanh in _layers_with_units(model):
        shape = layer.out_features, connections
        positions = torch.randint(layer.in_features, shape, generator=generator)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for draw in range(connections):  # one draw at a time: scatter leaves the order of duplicates open
            weight.scatter_(1, positions[:, draw : draw + 1], values[:, draw : draw + 1])
        if is_tanh:
            weight *= 0.25 if below_is_tanh else 0.5
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.fill_(0.5 if is_tanh else 0.0)
        below_is_tanh = is_tanh


def _layers_with_units(model: nn.Module) -> list[tuple[nn.Linear, bool]]:
    """Each linear layer, and whether its units are tanh."""
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    found: list[tuple[nn.Linear, bool]] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, nn.Linear):
            follower = leaves[index + 1] if index + 1 < len(leaves) else None
            found.append((leaf, isinstance(follower, nn.Tanh)))
    return found
