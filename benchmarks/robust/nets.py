"""Problems whose point is the net: its shape, its units, its initialisation, and the batches it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.robust.bundled import bundled, digits
from benchmarks.robust.regressions import friedman
from benchmarks.robust.task import Problem, Task, classes, net, split, standardised, values

__all__ = ["NETS"]


def _digits(
    seed: int,
    hidden: tuple[int, ...],
    activation: str = "relu",
    batch: int = 128,
    change: Callable[[nn.Module, int], None] | None = None,
) -> Task:
    """The digits with another net, which may be changed."""
    model = net((64, *hidden, 10), activation, seed)
    if change is not None:
        change(model, seed)
    return classes(model, split(seed, *digits()), batch)


def _one_layer_regression(seed: int) -> Task:
    x, y = friedman(seed)
    return values(net((10, 1), "relu", seed), split(seed, x, y), 100)


def _flat_iris(seed: int) -> Task:
    """Few inputs, few outputs and 1,500 units between."""
    x, y = bundled("iris")
    return classes(net((4, 1500, 3), "relu", seed), split(seed, standardised(x), y), 32)


@torch.no_grad()
def _orthogonal(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, generator=random)
            layer.bias.zero_()


def _times(factor: float) -> Callable[[nn.Module, int], None]:
    """All weights and biases multiplied."""

    @torch.no_grad()
    def change(model: nn.Module, seed: int) -> None:
        for parameter in model.parameters():
            parameter.mul_(factor)

    return change


_USUAL = (64, 64)

_SHAPES = [
    Problem("one-layer", "shape", lambda seed: _digits(seed, ())),
    Problem("one-layer-regression", "shape", _one_layer_regression),
    Problem("deep-relu", "shape", lambda seed: _digits(seed, (64,) * 29)),
    Problem("deep-tanh", "shape", lambda seed: _digits(seed, (64,) * 29, "tanh")),
    Problem("width-4", "shape", lambda seed: _digits(seed, (4, 4), "tanh")),
    Problem("width-2000", "shape", lambda seed: _digits(seed, (2000,))),
    Problem("flat-iris", "shape", _flat_iris),
    Problem("bottleneck-1", "shape", lambda seed: _digits(seed, (32, 1, 32), "tanh")),
]


def _activation(name: str) -> Problem:
    return Problem(f"units-{name}", "activation", lambda seed: _digits(seed, _USUAL, name))


def _batch(name: str, cases: int) -> Problem:
    return Problem(f"batch-{name}", "batch", lambda seed: _digits(seed, _USUAL, batch=cases))


def _initialisation(name: str, change: Callable[[nn.Module, int], None], activation: str = "relu") -> Problem:
    return Problem(f"init-{name}", "initialisation", lambda seed: _digits(seed, _USUAL, activation, change=change))


NETS = [
    *_SHAPES,
    *(_activation(name) for name in ("relu", "leaky", "gelu", "elu", "tanh", "logistic", "softplus")),
    _initialisation("orthogonal", _orthogonal),
    _initialisation("small", _times(0.01)),
    _initialisation("large", _times(5.0)),
    _initialisation("large-tanh", _times(5.0), "tanh"),
    *(_batch(str(cases), cases) for cases in (8, 16, 32, 500)),
    _batch("all", 10**9),
]
"""Batches of 128, the rest's own, are in ``units-relu``."""
