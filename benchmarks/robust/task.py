"""What a problem of this benchmark is, and the nets and splits that the problems are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Array", "Problem", "Task", "classes", "net", "split", "standardised", "values"]

Array = NDArray[np.float64]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "logistic": nn.Sigmoid,
    "softplus": nn.Softplus,
}
"""Hidden units by name."""


@dataclass
class Task:
    """A problem with its seed: everything that one run needs.

    Attributes:
        model: In torch's own initialisation unless that is the problem's point.
        x: Training inputs.
        y: Training targets.
        x_test: Test inputs.
        y_test: Test targets.
        likelihood: Name of the likelihood, and with it of the loss.
        batch: Cases of a mini-batch; a number above that of the cases means all of them.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    likelihood: str
    batch: int


@dataclass(frozen=True)
class Problem:
    """A named recipe from a seed to a `Task`; the seed decides data, split and initialisation.

    Attributes:
        name: Unique.
        kind: The group that it belongs to.
        build: The recipe.
        missing: Says why the problem cannot be run here, or nothing.
    """

    name: str
    kind: str
    build: Callable[[int], Task]
    missing: Callable[[], str | None] = lambda: None


def net(widths: Sequence[int], activation: str, seed: int) -> nn.Sequential:
    """Linear layers of these widths in torch's own initialisation; nothing follows the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for below, above in pairwise(widths):
            modules += [nn.Linear(below, above), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def standardised(x: Array) -> Array:
    """Columns of mean 0 and deviation 1; constant ones become 0."""
    deviation = x.std(0)
    centred: Array = x - x.mean(0)
    return centred / np.where(deviation > 0, deviation, 1.0)


def split(seed: int, x: Array, y: Array, train: int | None = None) -> tuple[Array, Array, Array, Array]:
    """Shuffle and divide into x, y, x_test, y_test; four fifths train if no number of cases is given."""
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    count = len(x) * 4 // 5 if train is None else train
    first, rest = order[:count], order[count:]
    return x[first], y[first], x[rest], y[rest]


def classes(model: nn.Module, parts: tuple[Array, Array, Array, Array], batch: int) -> Task:
    """A classifier of integer labels."""
    x, y, x_test, y_test = parts
    return Task(model, _floats(x), _labels(y), _floats(x_test), _labels(y_test), "categorical", batch)


def values(
    model: nn.Module, parts: tuple[Array, Array, Array, Array], batch: int, likelihood: str = "gaussian"
) -> Task:
    """Real targets, or with ``"bernoulli"`` such in [0, 1]; one column if they come as a vector."""
    x, y, x_test, y_test = parts
    return Task(model, _floats(x), _columns(y), _floats(x_test), _columns(y_test), likelihood, batch)


def _floats(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _columns(y: Array) -> Tensor:
    return _floats(y.reshape(len(y), -1))


def _labels(y: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
