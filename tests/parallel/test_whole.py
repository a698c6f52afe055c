"""A mini-batch in parts: the whole is the parts laid one into the other."""

from __future__ import annotations

import pytest
import torch

from kfacore.parallel.whole import Whole, interleaved


def test_equal_parts_are_every_second_case() -> None:
    assert [places.tolist() for places in interleaved((3, 3))] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("cases", [7, 8, 9])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_a_run_hands_out_by_turns_is_put_together_in_the_same_order(cases: int, ranks: int) -> None:
    parts = [torch.arange(cases)[rank::ranks] for rank in range(ranks)]
    for places, part in zip(interleaved(tuple(map(len, parts))), parts, strict=True):
        assert torch.equal(places, part)


@pytest.mark.parametrize("sizes", [(5, 1, 2), (40, 7), (1, 1, 1, 20), (4,), (3, 0, 2)])
def test_first_cases_are_a_share_of_every_part(sizes: tuple[int, ...]) -> None:
    parts = interleaved(sizes)
    assert sorted(torch.cat(parts).tolist()) == list(range(sum(sizes)))
    for cases in range(sum(sizes) + 1):
        counts = [Whole(sizes, rank).first(cases) for rank in range(len(sizes))]
        assert sum(counts) == cases
        for places, count, size in zip(parts, counts, sizes, strict=True):
            assert (places[:count] < cases).all()
            assert (places[count:] >= cases).all()
            assert abs(count - cases * size / sum(sizes)) <= len(sizes) / 2
