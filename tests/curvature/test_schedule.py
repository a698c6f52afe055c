"""The schedule of refreshes: the closed form against the walk that defines it."""

from __future__ import annotations

import pytest

from kfacore.curvature.schedule import FIRST_REFRESHES, scheduled


def walk(until: int, every: int, growth: float) -> list[int]:
    """Steps that refresh, from the definition: s + min(T_3, max(1, floor(g s)))."""
    found, at = list(range(1, FIRST_REFRESHES + 1)), FIRST_REFRESHES
    while at < until:
        at += min(every, max(1, int(growth * at)))
        found.append(at)
    return [step for step in found if step <= until]


@pytest.mark.parametrize("every", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("growth", [1e-3, 0.05, 0.25, 0.4, 1.0, 3.0, 1e9])
def test_growing_distances(every: int, growth: float) -> None:
    assert [step for step in range(1, 700) if scheduled(step, every, growth)] == walk(699, every, growth)


@pytest.mark.parametrize("every", [1, 3, 20])
def test_multiples(every: int) -> None:
    steps = {step for step in range(1, 200) if scheduled(step, every, None)}
    assert steps == {1, 2, 3} | set(range(every, 200, every))
