"""Symmetric matrices on their way: half the numbers, the same bits."""

from __future__ import annotations

import pytest
import torch

from kfacore.parallel.triangles import folded, folded_size, unfolded


@pytest.mark.parametrize("d", range(1, 9))
def test_a_symmetric_matrix_travels_as_half_and_arrives_as_it_was(d: int) -> None:
    X = torch.randn(2, d, d)
    X = X + X.mT
    values = folded(X)
    assert values.shape == (2, folded_size(d))
    assert folded_size(d) == d * (d + 1) // 2
    assert torch.equal(unfolded(values, d), X)
    assert torch.equal(unfolded(folded(X[0]), d), X[0])
    assert unfolded(values, d).is_contiguous()


def test_what_is_not_finite_stays_where_it_is() -> None:
    X = torch.eye(5)
    X[0, 3] = X[3, 0] = torch.nan
    X[4, 4] = torch.inf
    assert torch.equal(unfolded(folded(X), 5).isfinite(), X.isfinite())


def test_the_lower_half_is_not_read() -> None:
    X = torch.randn(6, 6)
    whole = X.triu() + X.triu(1).T
    assert torch.equal(unfolded(folded(X), 6), whole)
