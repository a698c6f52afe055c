"""Problems whose point is what is to be told apart."""

from __future__ import annotations

import numpy as np

from benchmarks.robust.bundled import bundled, digits
from benchmarks.robust.task import Array, Problem, Task, classes, net, split, standardised, values

__all__ = ["CLASSIFIERS", "moons"]


def _digits(seed: int) -> Task:
    return classes(net((64, 256, 256, 10), "relu", seed), split(seed, *digits()), 128)


def _digits_tanh(seed: int) -> Task:
    return classes(net((64, 64, 32, 10), "tanh", seed), split(seed, *digits()), 500)


def _digits_200(seed: int) -> Task:
    return classes(net((64, 256, 256, 10), "relu", seed), split(seed, *digits(), train=200), 200)


def _iris(seed: int) -> Task:
    x, y = bundled("iris")
    return classes(net((4, 16, 3), "tanh", seed), split(seed, standardised(x), y), 32)


def _wine(seed: int) -> Task:
    x, y = bundled("wine")
    return classes(net((13, 32, 3), "relu", seed), split(seed, standardised(x), y), 32)


def _cancer(seed: int) -> Task:
    x, y = bundled("breast_cancer")
    return classes(net((30, 64, 64, 2), "relu", seed), split(seed, standardised(x), y), 64)


def _cancer_bernoulli(seed: int) -> Task:
    x, y = bundled("breast_cancer")
    return values(net((30, 32, 1), "tanh", seed), split(seed, standardised(x), y), 32, "bernoulli")


def moons(seed: int, cases: int = 1000, noise: float = 0.15) -> tuple[Array, Array]:
    """Two half circles that reach into each other."""
    random = np.random.default_rng(seed)
    y = np.arange(cases) % 2
    angle = np.pi * random.random(cases)
    x = np.where(y == 0, np.cos(angle), 1.0 - np.cos(angle)), np.where(y == 0, np.sin(angle), 0.5 - np.sin(angle))
    return np.stack(x, 1) + noise * random.standard_normal((cases, 2)), y.astype(np.float64)


def _moons(seed: int) -> Task:
    return classes(net((2, 16, 16, 2), "tanh", seed), split(seed, *moons(seed)), 100)


def _moons_bernoulli(seed: int) -> Task:
    return values(net((2, 32, 32, 1), "relu", seed), split(seed, *moons(seed)), 64, "bernoulli")


def _spirals(seed: int) -> Task:
    random = np.random.default_rng(seed)
    y = np.arange(1500) % 3
    radius = np.sqrt(random.random(1500))
    angle = 2.0 * np.pi * (y / 3.0 + 1.25 * radius)
    x = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1) * 2.0 + 0.03 * random.standard_normal((1500, 2))
    return classes(net((2, 64, 64, 3), "relu", seed), split(seed, x, y.astype(np.float64)), 64)


def _xor(seed: int) -> Task:
    """The sign of a product, beside eight inputs that mean nothing."""
    x = np.random.default_rng(seed).standard_normal((1000, 10))
    return classes(net((10, 32, 2), "tanh", seed), split(seed, x, (x[:, 0] * x[:, 1] > 0).astype(np.float64)), 32)


def _imbalanced(seed: int) -> Task:
    random = np.random.default_rng(seed)
    y = (np.arange(3030) % 101 == 0).astype(np.float64)
    x = random.standard_normal((3030, 20)) + 0.7 * y[:, None]
    return classes(net((20, 64, 2), "relu", seed), split(seed, x, y), 64)


def _thousand_classes(seed: int) -> Task:
    random = np.random.default_rng(seed)
    y = np.arange(5000) % 1000
    x = random.standard_normal((1000, 32))[y] + 0.3 * random.standard_normal((5000, 32))
    return classes(net((32, 128, 1000), "relu", seed), split(seed, x, y.astype(np.float64)), 250)


def _ten_a_class(seed: int) -> Task:
    x, y = digits()
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    train = np.concatenate([order[y[order] == digit][:10] for digit in range(10)])
    rest = np.setdiff1d(order, train)
    return classes(net((64, 128, 10), "relu", seed), (x[train], y[train], x[rest], y[rest]), 25)


def _noisy_labels(seed: int) -> Task:
    x, y, x_test, y_test = split(seed, *digits())
    random = np.random.default_rng([seed, 2])
    y = np.where(random.random(len(y)) < 0.2, random.integers(0, 10, len(y)), y)
    return classes(net((64, 128, 64, 10), "relu", seed), (x, y, x_test, y_test), 64)


def _separable(seed: int) -> Task:
    """Far apart: the loss has no minimum, weights may grow for ever."""
    random = np.random.default_rng(seed)
    y = np.arange(1000) % 2
    x = random.standard_normal((1000, 20)) + np.where(y == 0, -1.5, 1.5)[:, None]
    return classes(net((20, 32, 2), "relu", seed), split(seed, x, y.astype(np.float64)), 50)


def _many_labels(seed: int) -> Task:
    """Ten labels a case, each there or not there."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2000, 20))
    z = np.tanh(x @ random.standard_normal((20, 16)) / 4.0) @ random.standard_normal((16, 10)) * 2.0
    y = (random.random(z.shape) < 1.0 / (1.0 + np.exp(-z))).astype(np.float64)
    return values(net((20, 64, 10), "tanh", seed), split(seed, x, y), 64, "bernoulli")


CLASSIFIERS = [
    Problem("digits", "classifier", _digits),
    Problem("digits-tanh", "classifier", _digits_tanh),
    Problem("digits-200", "classifier", _digits_200),
    Problem("moons", "classifier", _moons),
    Problem("iris", "classifier", _iris),
    Problem("wine", "classifier", _wine),
    Problem("cancer", "classifier", _cancer),
    Problem("spirals", "classifier", _spirals),
    Problem("xor", "classifier", _xor),
    Problem("imbalanced", "classifier", _imbalanced),
    Problem("thousand-classes", "classifier", _thousand_classes),
    Problem("ten-a-class", "classifier", _ten_a_class),
    Problem("noisy-labels", "classifier", _noisy_labels),
    Problem("separable", "classifier", _separable),
    Problem("moons-bernoulli", "binary", _moons_bernoulli),
    Problem("cancer-bernoulli", "binary", _cancer_bernoulli),
    Problem("many-labels", "binary", _many_labels),
]
"""The most telling first."""
