"""Checks of targets that several likelihoods share."""

from __future__ import annotations

from torch import Tensor

from kfacore.errors import DataError

__all__ = ["require_finite", "require_matrix"]


def require_matrix(y: Tensor, outputs: int, where: str, likelihood: str) -> None:
    """Refuse targets that are not a floating-point (N, outputs) matrix.

    Raises:
        DataError: Wrong number of dimensions, columns, or an integer dtype.
    """
    if y.ndim != 2 or y.shape[1] != outputs:
        hint = " (integer class numbers need the categorical likelihood)" if y.ndim == 1 else ""
        raise DataError(
            f"{where}: the {likelihood} likelihood needs shape (N, {outputs}), one column for each output of the "
            f"model, found {tuple(y.shape)}{hint}"
        )
    if not y.is_floating_point():
        raise DataError(
            f"{where}: the {likelihood} likelihood needs floating-point targets, found {_name(y)}; convert them, for "
            "example with .float()"
        )


def require_finite(y: Tensor, where: str) -> None:
    """Refuse NaN and infinity, naming the first case that has one.

    Raises:
        DataError: At least one entry is not finite.
    """
    bad = ~y.isfinite().all(dim=1)
    if bool(bad.any()):
        count, first = int(bad.sum()), int(bad.nonzero()[0, 0])
        raise DataError(
            f"{where}: {count} of {y.shape[0]} cases hold NaN or infinity, the first is case {first}; remove or repair "
            "them"
        )


def _name(y: Tensor) -> str:
    return str(y.dtype).removeprefix("torch.")
