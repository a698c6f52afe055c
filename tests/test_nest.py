"""Nests of tensors whose first dimension is the case."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from kfacore.errors import DataError
from kfacore.nest import cases_of, map_nest, repeat_cases, slice_cases, tensors_of


class Pair(NamedTuple):
    first: Any
    second: Any


A, B = torch.arange(6.0).reshape(3, 2), torch.arange(3)
NEST = {"x": [A, None], "pair": Pair(B, (A, "text"))}


def test_tensors_come_in_order() -> None:
    found = list(tensors_of(NEST))
    assert [id(tensor) for tensor in found] == [id(A), id(B), id(A)]
    assert list(tensors_of(None)) == []


def test_map_keeps_the_form_and_other_leaves() -> None:
    mapped = map_nest(lambda tensor: tensor + 1, NEST)
    assert list(mapped) == ["x", "pair"]
    assert type(mapped["pair"]) is Pair
    assert type(mapped["pair"].second) is tuple
    assert mapped["x"][1] is None
    assert mapped["pair"].second[1] == "text"
    assert [tensor.tolist() for tensor in tensors_of(mapped)] == [(A + 1).tolist(), (B + 1).tolist(), (A + 1).tolist()]
    assert A[0, 0] == 0.0


def test_cases() -> None:
    assert cases_of(A) == cases_of(NEST) == 3


@pytest.mark.parametrize(
    ("nest", "message"),
    [
        (None, "no tensor found, but NoneType"),
        ([], "no tensor found, but list"),
        (torch.tensor(1.0), r"found shapes \(\)"),
        ([A, torch.ones(2, 2)], r"found shapes \(3, 2\), \(2, 2\)"),
        ([A, torch.tensor(1.0)], r"found shapes \(3, 2\), \(\)"),
        (A[:0], "has no examples"),
    ],
)
def test_what_has_no_cases_is_refused(nest: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^inputs: .*{message}"):
        cases_of(nest)


def test_slices_are_views() -> None:
    sliced = slice_cases(NEST, 1, 3)
    assert [len(tensor) for tensor in tensors_of(sliced)] == [2, 2, 2]
    assert sliced["x"][0].data_ptr() == A[1:].data_ptr()
    assert slice_cases(A, 2, 9).tolist() == [[4.0, 5.0]]


def test_repeats_are_whole_copies_one_after_the_other() -> None:
    repeated = repeat_cases(NEST, 2)
    assert repeated["pair"].first.tolist() == [0, 1, 2, 0, 1, 2]
    assert repeated["x"][0].tolist() == [*A.tolist(), *A.tolist()]
    assert repeat_cases(NEST, 1) is NEST
