"""Problems whose point is that nobody prepared the data."""

from __future__ import annotations

import numpy as np

from benchmarks.robust.bundled import bundled, digits
from benchmarks.robust.regressions import friedman
from benchmarks.robust.task import Problem, Task, classes, net, split, standardised, values

__all__ = ["INPUTS"]


def _raw_pixels(seed: int) -> Task:
    """Inputs from 0 to 255."""
    x, y = digits()
    return classes(net((64, 128, 10), "relu", seed), split(seed, 255.0 * x, y), 128)


def _raw_cancer(seed: int) -> Task:
    """Thirty measurements in their own units, from 0.001 to 4,000."""
    x, y = bundled("breast_cancer")
    return classes(net((30, 32, 2), "tanh", seed), split(seed, x, y), 64)


def _eight_scales(seed: int) -> Task:
    """Columns of eight scales, from 1e-3 to 1e3."""
    x, y = friedman(seed)
    scales = np.geomspace(1e-3, 1e3, 8)[np.arange(10) % 8]
    return values(net((10, 64, 64, 1), "tanh", seed), split(seed, x * scales, y), 100)


def _constant_and_duplicate(seed: int) -> Task:
    """Every informative column twice, and as many that never change: 0, 1 or 5."""
    x, y = bundled("wine")
    x = standardised(x)
    constant = np.broadcast_to(np.arange(13) % 3 * np.array(2.5), x.shape)
    return classes(net((39, 32, 3), "relu", seed), split(seed, np.concatenate((x, x, constant), 1), y), 32)


def _outliers(seed: int) -> Task:
    """One case of a hundred is 50 times as far out, inputs and target."""
    x, y = friedman(seed)
    far = np.where(np.random.default_rng([seed, 2]).random(len(y)) < 0.01, 50.0, 1.0)
    return values(net((10, 64, 64, 1), "relu", seed), split(seed, x * far[:, None], y * far), 100)


def _fifty_cases(seed: int) -> Task:
    x, y = friedman(seed, 550)
    return values(net((10, 64, 64, 1), "tanh", seed), split(seed, x, y, train=50), 50)


def _rank_deficient(seed: int) -> Task:
    """A hundred inputs that are combinations of five."""
    random = np.random.default_rng(seed)
    code = random.standard_normal((1000, 5))
    y = (np.abs(code[:, 0]) + code[:, 1] * code[:, 2] > 0.5).astype(np.float64)
    x = code @ random.standard_normal((5, 100)) / 5.0**0.5
    return classes(net((100, 64, 2), "relu", seed), split(seed, x, y), 64)


INPUTS = [
    Problem("raw-pixels", "data", _raw_pixels),
    Problem("raw-cancer", "data", _raw_cancer),
    Problem("eight-scales", "data", _eight_scales),
    Problem("constant-and-duplicate", "data", _constant_and_duplicate),
    Problem("outliers", "data", _outliers),
    Problem("fifty-cases", "data", _fifty_cases),
    Problem("rank-deficient", "data", _rank_deficient),
]
