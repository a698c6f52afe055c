"""When the approximate inverse is refreshed: a pure function of the step (method, section 2, step 4)."""

from __future__ import annotations

__all__ = ["FIRST_REFRESHES", "scheduled"]

FIRST_REFRESHES = 3
"""The first steps always refresh: their averages still change much (method, section 2, step 4)."""


def scheduled(step: int, every: int, growth: float | None) -> bool:
    """Whether a refresh is scheduled in a step: the first three, and every T_3 or sooner.

    With a growth g the refresh after step s comes at s + min(T_3, max(1, floor(g s))): the parameters move most in the
    first steps, and the averages, whose weights are 1/k there, with them.

    Args:
        step: Its number, from 1.
        every: T_3.
        growth: g; None keeps to multiples of T_3.
    """
    if step <= FIRST_REFRESHES:
        return True
    if growth is None:
        return step % every == 0
    at = FIRST_REFRESHES
    while at < step and growth * at < every:  # from there on the distance is T_3
        at += min(every, max(1, int(growth * at)))
    return at == step if at >= step else (step - at) % every == 0
