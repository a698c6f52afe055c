"""The data sets that come with scikit-learn, which is imported when the first of them is needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import numpy as np

from benchmarks.robust.task import Array

__all__ = ["bundled", "digits", "digits_28"]


@cache
def bundled(name: str) -> tuple[Array, Array]:
    """Inputs as they are and targets of ``"digits"``, ``"iris"``, ``"wine"``, ``"breast_cancer"`` or ``"diabetes"``.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    datasets = import_module("sklearn.datasets")
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


def digits() -> tuple[Array, Array]:
    """1,797 images of 8x8 with ink from 0 to 1, and which digit each is."""
    x, y = bundled("digits")
    return x / 16.0, y


@cache
def digits_28() -> Array:
    """The digits as 28x28 images, interpolated bilinearly: what stands in for MNIST."""
    x, _ = digits()
    at = np.linspace(0.0, 7.0, 28)
    low = np.minimum(at.astype(int), 6)
    share = at - low
    weights = np.zeros((28, 8))
    weights[np.arange(28), low] = 1.0 - share
    weights[np.arange(28), low + 1] += share
    images = weights @ x.reshape(-1, 8, 8) @ weights.T
    return images.reshape(-1, 784).clip(0.0, 1.0)
