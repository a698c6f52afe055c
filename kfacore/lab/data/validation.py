"""Checks of whole data sets before training, where a wrong entry costs a message and not a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kfacore.roles import Likelihood, ProblemData, Split

__all__ = ["check"]


def check(
    data: ProblemData, likelihood: Likelihood, outputs: int, rows: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Refuse data that cannot be trained or tested on.

    Args:
        data: The problem's data, on the CPU.
        likelihood: The likelihood, which knows what targets it takes.
        outputs: The model's number of outputs, o; of one position, where outputs have positions.
        rows: Targets as rows, one a position, for a model whose outputs have positions.

    Raises:
        DataError: A split without cases, NaN or infinite inputs, different numbers of inputs and targets, test
            cases of another shape than training cases, or targets that the likelihood refuses.
    """
    _check_split(data.train, "train", data.source)
    if data.test is not None:
        _check_split(data.test, "test", data.source)
        if data.test.inputs.shape[1:] != data.train.inputs.shape[1:]:
            raise DataError(
                f"test inputs ({data.source}): each example has shape {tuple(data.test.inputs.shape[1:])}, but "
                f"training examples have {tuple(data.train.inputs.shape[1:])}; both must agree"
            )
    for name, split in (("training", data.train), ("test", data.test)):
        if split is not None:
            y = split.targets if rows is None else rows(split.targets)
            said = "" if len(y) == len(split) else f", as rows, {len(y) // len(split)} positions an example"
            likelihood.check_targets(y, outputs, f"{name} targets ({data.source}{said})")


def _check_split(split: Split, name: str, source: str) -> None:
    inputs, targets = split.inputs, split.targets
    where = f"{'training' if name == 'train' else name} inputs ({source})"
    if inputs.ndim == 0 or inputs.numel() == 0:
        raise DataError(f"{where}: no examples, shape {tuple(inputs.shape)}; give at least one")
    if targets.ndim == 0 or targets.shape[0] != inputs.shape[0]:
        count = 0 if targets.ndim == 0 else targets.shape[0]
        raise DataError(f"{where}: {inputs.shape[0]} examples, but {count} targets; each example needs one")
    if not inputs.is_floating_point():
        return
    bad = ~inputs.isfinite().reshape(inputs.shape[0], -1).all(dim=1)
    if bool(bad.any()):
        count, first = int(bad.sum()), int(bad.nonzero()[0, 0])
        raise DataError(
            f"{where}: {count} of {inputs.shape[0]} examples hold NaN or infinity, the first is example {first}; "
            "remove or repair them"
        )
