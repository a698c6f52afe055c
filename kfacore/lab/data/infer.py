"""Which likelihood targets suggest by their values. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FEW_CLASSES", "are_classes", "likelihood_of"]

FEW_CLASSES = 20
"""Up to so many classes may be guessed from the largest label, however few of them occur."""


def are_classes(y: NDArray[Any]) -> bool:
    """Whether integers look like class numbers: from 0 on, most of them occurring, and each several times.

    Ids, years, prices and counts do not.
    """
    import numpy as np

    if y.dtype.kind not in "uib" or not y.size or y.min() < 0:
        return False
    classes, distinct = int(y.max()) + 1, len(np.unique(y))
    return classes <= max(FEW_CLASSES, 2 * distinct) and distinct <= max(FEW_CLASSES, y.size // 2)


def likelihood_of(y: NDArray[Any]) -> tuple[str, str]:
    """The likelihood that targets suggest, and what it is concluded from.

    Args:
        y: Integers or real numbers of any shape, finite.

    Returns:
        A name and words: ``"categorical"`` for integers that are class numbers, ``"bernoulli"`` for real numbers that
        are all 0 or 1, ``"gaussian"`` for all others.
    """
    import numpy as np

    if are_classes(y):
        return "categorical", f"integers, {len(np.unique(y))} distinct ones"
    if y.dtype.kind == "f" and bool(((y == 0.0) | (y == 1.0)).all()):
        return "bernoulli", "all 0 or 1"
    return "gaussian", "real numbers" if y.dtype.kind == "f" else "integers that are no class numbers"
