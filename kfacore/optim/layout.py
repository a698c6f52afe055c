"""Where the numbers of a position stand in a model's outputs, and outputs as rows: one row a position of an example."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kfacore.errors import DataError

__all__ = ["Layout", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """The form of outputs z, (n, *positions, o), or (n, o, *positions) with the classes second, or (n,) for one output.

    Attributes:
        positions: Shape of the positions of one example; empty for z (n, o).
        outputs: o, the numbers of a position.
        second: Whether they stand in the second dimension.
        scalar: Whether z is (n,).
    """

    positions: tuple[int, ...]
    outputs: int
    second: bool = False
    scalar: bool = False

    @property
    def rows(self) -> int:
        """Rows an example, R."""
        return math.prod(self.positions)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's z."""
        if self.scalar:
            return ()
        return (self.outputs, *self.positions) if self.second else (*self.positions, self.outputs)

    def to_rows(
        self,
        values: Tensor,  # ([k,] n, ...) shaped as z behind k
        leading: int = 0,
    ) -> Tensor:  # ([k,] n R, o)
        """Outputs, or anything shaped like them, as rows."""
        if self.scalar:
            return values.unsqueeze(-1)
        if not self.positions:
            return values
        if self.second:
            values = values.movedim(leading + 1, -1)
        return values.reshape(*values.shape[:leading], -1, self.outputs)

    def from_rows(
        self,
        rows: Tensor,  # ([k,] n R, o)
    ) -> Tensor:  # ([k,] n, ...)
        """The inverse of `to_rows`."""
        if self.scalar:
            return rows.squeeze(-1)
        if not self.positions:
            return rows
        leading = rows.dim() - 2
        values = rows.reshape(*rows.shape[:leading], -1, *self.positions, self.outputs)
        return values.movedim(-1, leading + 1) if self.second else values

    def target_rows(self, y: Tensor) -> Tensor:  # (n R,) or (n R, o)
        """Targets as rows; for z (n, o) they are left to the likelihood to judge."""
        if self.positions and tuple(y.shape[1:]) == self.positions:
            return y.reshape(-1)
        if self.scalar:
            return y.unsqueeze(-1) if y.is_floating_point() and y.dim() == 1 else y
        return self.to_rows(y)

    def mask_rows(self, mask: Tensor) -> Tensor:  # (n R,)
        """A mask, one entry a position or one an example, as rows.

        Raises:
            DataError: It has another shape.
        """
        if mask.dim() == 1:
            return mask.repeat_interleave(self.rows) if self.rows != 1 else mask
        if tuple(mask.shape[1:]) != self.positions:
            raise DataError(
                f"valid: a mask of shape {(len(mask), *self.positions)} is needed, one entry a position, found "
                f"{tuple(mask.shape)}"
            )
        return mask.reshape(-1)


def find_layout(
    z: Tensor,
    y: Tensor,
    mask: Tensor | None,
    *,
    prefer_second: bool,
    where: str,
) -> tuple[Layout, bool]:
    """The layout that outputs, targets and mask agree on.

    Args:
        z: Outputs of some examples.
        y: Targets.
        mask: Positions that count, if said.
        prefer_second: What to take where the shapes leave it open.
        where: What the targets are called in messages.

    Returns:
        The layout, and whether the shapes alone told it.

    Raises:
        DataError: No layout fits.
    """
    if z.dim() < 2:
        return Layout((), 1, scalar=True), True
    if z.dim() == 2:
        return Layout((), z.shape[1]), True
    last, second = Layout(tuple(z.shape[1:-1]), z.shape[-1]), Layout(tuple(z.shape[2:]), z.shape[1], second=True)
    fits = [
        layout
        for layout in (last, second)
        if tuple(y.shape[1:]) in (layout.positions, tuple(z.shape[1:]))
        and (mask is None or mask.dim() == 1 or tuple(mask.shape[1:]) == layout.positions)
    ]
    if not fits:
        n = len(y)
        masked = "" if mask is None else f" with a mask of shape {tuple(mask.shape)}"
        raise DataError(
            f"{where}: outputs of shape {(n, *z.shape[1:])} need class numbers of shape {(n, *last.positions)}, or "
            f"{(n, *second.positions)} if the classes stand second, or one number an output, and a mask of one entry a "
            f"position; found {tuple(y.shape)}{masked}"
        )
    if len(fits) == 1:
        return fits[0], True
    return (second if prefer_second else last), False
