"""Problems with real targets, most of them about the targets' form and scale."""

from __future__ import annotations

import numpy as np

from benchmarks.robust.bundled import bundled
from benchmarks.robust.task import Array, Problem, Task, net, split, standardised, values

__all__ = ["REGRESSIONS", "friedman"]


def friedman(seed: int, cases: int = 2000) -> tuple[Array, Array]:
    """Ten uniform inputs, of which five make a nonlinear function of mean 0, deviation 1 and a tenth of noise."""
    random = np.random.default_rng(seed)
    x = random.random((cases, 10))
    y = 10.0 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20.0 * (x[:, 2] - 0.5) ** 2 + 10.0 * x[:, 3] + 5.0 * x[:, 4]
    return standardised(x), (y - 14.4) / 4.9 + 0.1 * random.standard_normal(cases)


def _scaled(seed: int, scale: float, mean: float = 0.0) -> Task:
    x, y = friedman(seed)
    return values(net((10, 64, 64, 1), "tanh", seed), split(seed, x, scale * y + mean), 100)


def _linear(seed: int) -> Task:
    random = np.random.default_rng(seed)
    x = random.standard_normal((1000, 20))
    y = x @ random.standard_normal(20) / 20.0**0.5 + 0.1 * random.standard_normal(1000)
    return values(net((20, 32, 1), "relu", seed), split(seed, x, y), 64)


def _diabetes(seed: int) -> Task:
    x, y = bundled("diabetes")
    return values(net((10, 64, 64, 1), "relu", seed), split(seed, standardised(x), standardised(y)), 64)


def _diabetes_raw(seed: int) -> Task:
    """Targets as they come: 25 to 346."""
    x, y = bundled("diabetes")
    return values(net((10, 64, 64, 1), "relu", seed), split(seed, standardised(x), y), 32)


def _heavy_tails(seed: int) -> Task:
    """Noise of Student's t with 1.5 degrees of freedom, which has no variance."""
    x, y = friedman(seed)
    noise = np.random.default_rng([seed, 2]).standard_t(1.5, len(y))
    return values(net((10, 64, 64, 1), "relu", seed), split(seed, x, y + 0.3 * noise), 100)


def _wave(seed: int) -> Task:
    """One input, one output, four periods."""
    random = np.random.default_rng(seed)
    x = 2.0 * random.random((1000, 1)) - 1.0
    y = np.sin(4.0 * np.pi * x[:, 0]) + 0.05 * random.standard_normal(1000)
    return values(net((1, 64, 64, 1), "tanh", seed), split(seed, x, y), 100)


def _fifty_outputs(seed: int) -> Task:
    random = np.random.default_rng(seed)
    x = random.standard_normal((2000, 30))
    y = np.tanh(x @ random.standard_normal((30, 20)) / 4.0) @ random.standard_normal((20, 50))
    return values(net((30, 128, 50), "relu", seed), split(seed, x, y + 0.1 * random.standard_normal(y.shape)), 100)


REGRESSIONS = [
    Problem("friedman", "regression", lambda seed: _scaled(seed, 1.0)),
    Problem("targets-x100", "regression", lambda seed: _scaled(seed, 100.0)),
    Problem("targets-x0.01", "regression", lambda seed: _scaled(seed, 0.01)),
    Problem("targets-mean-1000", "regression", lambda seed: _scaled(seed, 1.0, 1000.0)),
    Problem("linear", "regression", _linear),
    Problem("diabetes", "regression", _diabetes),
    Problem("diabetes-raw", "regression", _diabetes_raw),
    Problem("heavy-tails", "regression", _heavy_tails),
    Problem("wave", "regression", _wave),
    Problem("fifty-outputs", "regression", _fifty_outputs),
]
