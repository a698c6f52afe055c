"""Checks of targets, and what options do to them, that several likelihoods share."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacore.errors import ConfigError, DataError

__all__ = ["Row", "require_finite", "require_matrix"]

_MANY = 20
"""More distinct whole numbers than this are hardly classes."""


class Row:
    """A row of numbers from the configuration, kept on the device where it is used.

    Args:
        name: The key, for messages.
        values: One number for all outputs, or one an output.
    """

    def __init__(self, name: str, values: tuple[float, ...]) -> None:
        self._name = name
        self._values = values
        self._tensor: Tensor | None = None

    def to(self, outputs: int, like: Tensor) -> Tensor:  # (o,)
        """The numbers in the dtype and on the device of ``like``; copied there once, so that steps do not wait.

        Raises:
            ConfigError: Their number is not that of the outputs.
        """
        found = self._tensor
        if found is None or found.dtype != like.dtype or found.device != like.device or len(found) != outputs:
            if len(self._values) not in (1, outputs):
                raise ConfigError(
                    f"likelihood.{self._name} has {len(self._values)} numbers, the model has {outputs} outputs; give "
                    "one an output"
                )
            row = torch.tensor(self._values, dtype=torch.float64).to(like)
            self._tensor = found = row.expand(outputs)
        return found


def require_matrix(y: Tensor, outputs: int, where: str, likelihood: str) -> None:
    """Refuse targets that are not a floating-point (N, outputs) matrix.

    Raises:
        DataError: Wrong number of dimensions, columns, or an integer dtype.
    """
    if y.ndim != 2 or y.shape[1] != outputs:
        hint = _advice(y, outputs) if y.ndim == 1 else ""
        raise DataError(
            f"{where}: the {likelihood} likelihood needs shape (N, {outputs}), one column for each output of the "
            f"model, found {tuple(y.shape)}{hint}"
        )
    if not y.is_floating_point():
        raise DataError(
            f"{where}: the {likelihood} likelihood needs floating-point targets, found {_name(y)}; convert them, for "
            "example with .float()"
        )


def _advice(y: Tensor, outputs: int) -> str:
    """What a vector in place of a matrix most probably is."""
    if y.is_floating_point():
        return " (one number an example: give them as a column, .unsqueeze(1))" if outputs == 1 else ""
    distinct = len(torch.unique(y.long()))
    if distinct > _MANY or outputs == 1:
        return (
            f" (whole numbers, {distinct} distinct ones: if they are quantities and not classes, make them "
            "floating-point, one column an output: .float().unsqueeze(1), or problem.task=regression for a .npz file)"
        )
    return " (integer class numbers need the categorical likelihood)"


def require_finite(y: Tensor, where: str) -> None:
    """Refuse NaN and infinity, naming the first case that has one.

    Raises:
        DataError: At least one entry is not finite.
    """
    bad = ~y.isfinite().all(dim=1)
    if bool(bad.any()):
        count, first = int(bad.sum()), int(bad.nonzero()[0, 0])
        raise DataError(
            f"{where}: {count} of {y.shape[0]} examples hold NaN or infinity, the first is example {first}; remove or "
            "repair them"
        )


def _name(y: Tensor) -> str:
    return str(y.dtype).removeprefix("torch.")
