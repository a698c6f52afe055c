"""What an inspection comes to, in one sentence: which approximation is best here, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from kfacore.lab.diagnostics.quality import UpdateQuality

__all__ = ["verdict"]

_EQUAL = 1.02
"""Shares closer than this factor are called equal."""


def verdict(rows: Sequence[UpdateQuality], gamma: float) -> str:
    """Compare approximations, each at the gamma that is best for it, by the re-scaled decrease.

    Args:
        rows: Every approximation at every gamma; at least one.
        gamma: The subject's own gamma.

    Returns:
        A sentence.
    """
    best: dict[str, UpdateQuality] = {}
    for row in rows:
        if row.approx not in best or row.rescaled > best[row.approx].rescaled:
            best[row.approx] = row
    first, *others = sorted(best.values(), key=lambda row: -row.rescaled)
    buys = f"{_percent(first.rescaled)} of the best possible decrease ({_at(first, gamma)})"
    if not others:
        return f"{first.approx} was measured alone: its re-scaled update buys {buys}."
    equal = [row for row in others if row.rescaled > 0 and first.rescaled <= _EQUAL * row.rescaled]
    rest = [row for row in others if row not in equal]
    names = ", ".join([first.approx, *(row.approx for row in equal)])
    said = f"{names} are equally good here: {buys}" if equal else f"{first.approx} is best here: it buys {buys}"
    if not rest:
        return f"{said}."
    second = rest[0]
    if second.rescaled <= 0:
        return f"{said}; {second.approx}, the next, buys nothing."
    factor = first.rescaled / second.rescaled
    return f"{said}, {factor:.2f} times what {second.approx} buys ({_percent(second.rescaled)}, {_at(second, gamma)})."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _at(row: UpdateQuality, gamma: float) -> str:
    own = ", the model's own" if row.gamma == gamma else ""
    return f"gamma {row.gamma:.3g}{own}"
