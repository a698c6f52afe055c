"""What targets suggest by their values."""

from __future__ import annotations

import numpy as np
import pytest

from kfacore.lab.data.infer import are_classes, likelihood_of


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (np.arange(30) % 3, "categorical"),
        (np.array([0, 1, 1], np.uint8), "categorical"),
        (np.array([[0, 5], [7, 1]]), "categorical"),
        (np.array([1999, 2001, 2004]), "gaussian"),
        (np.array([-1, 0, 1]), "gaussian"),
        (np.arange(100), "gaussian"),
        (np.array([[0.0, 1.0], [1.0, 1.0]]), "bernoulli"),
        (np.array([0.0, 0.5, 1.0]), "gaussian"),
        (np.array([0.0, 2.0]), "gaussian"),
    ],
)
def test_the_likelihood_of_targets(y: np.ndarray, kind: str) -> None:
    assert likelihood_of(y)[0] == kind
    assert are_classes(y) == (kind == "categorical")
