"""Whole data sets are checked before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfacore.errors import DataError
from kfacore.lab.data import check
from kfacore.roles import ProblemData, Split

NAN = float("nan")
X = torch.full((4, 3), 0.5)
LABELS = torch.tensor([0, 1, 1, 0])


def data(train: Split, test: Split | None = None) -> ProblemData:
    return ProblemData(train, test, checksum="", source="toy.npz")


def with_entry(value: float) -> Tensor:
    changed = X.clone()
    changed[2, 1] = value
    return changed


def test_sound_data_pass() -> None:
    check(data(Split(X, LABELS), Split(X[:1], LABELS[:1])), Categorical(), 2)
    check(data(Split(X, X)), Bernoulli(), 3)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (Split(with_entry(NAN), LABELS), None, r"training inputs \(toy.npz\): 1 of 4 examples.*example 2"),
        (Split(with_entry(-torch.inf), LABELS), None, "hold NaN or infinity"),
        (Split(X[:0], LABELS[:0]), None, "no examples"),
        (Split(X, LABELS[:3]), None, "4 examples, but 3 targets"),
        (Split(X, LABELS), Split(X[:0], LABELS[:0]), r"test inputs \(toy.npz\): no examples"),
        (Split(X, LABELS), Split(with_entry(NAN), LABELS), "test inputs"),
        (Split(X, LABELS), Split(X[:, :2], LABELS), r"shape \(2,\).*\(3,\)"),
        (Split(X, LABELS + 1), None, "training targets.*found 2 at example 1"),
        (Split(X, LABELS), Split(X, LABELS - 1), "test targets.*found -1 at example 0"),
    ],
)
def test_unsound_data_are_refused(train: Split, test: Split | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(data(train, test), Categorical(), 2)


def test_likelihood_has_its_say() -> None:
    with pytest.raises(DataError, match=r"training targets \(toy.npz\).*\[0, 1\]"):
        check(data(Split(X + 1, X + 1)), Bernoulli(), 3)
