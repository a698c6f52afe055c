"""Targets and masks of a mini-batch: taken as they come, looked at in every step, without waiting for a device."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError

__all__ = ["DeferredRefusal", "as_mask", "fill_invalid", "on_host", "true_on_host"]


def as_mask(valid: Any, cases: int, device: torch.device) -> Tensor:
    """A mask of positions that count, as bool; 0 and 1 are taken as tokenizers give them.

    Raises:
        DataError: It is no such tensor, or does not fit the mini-batch.
    """
    if not isinstance(valid, Tensor) or valid.dim() == 0:
        raise DataError(f"valid: a tensor with one entry a position is needed, found a {type(valid).__name__}")
    if valid.is_floating_point() or valid.is_complex():
        name = str(valid.dtype).removeprefix("torch.")
        raise DataError(f"valid: true and false (or 1 and 0) say which positions count, found {name}; weights are not")
    if len(valid) != cases:
        raise DataError(f"valid: found {len(valid)} rows of the mask for {cases} examples of inputs")
    if valid.device != device:
        raise DataError(f"valid: it is on {valid.device}, the model's outputs on {device}; move it there")
    return valid.bool()


def fill_invalid(
    y: Tensor,  # (N, ...)
    valid: Tensor,  # (N,) bool
) -> Tensor:
    """Rows that do not count replaced by the first that does, so that a likelihood sees targets it can take."""
    first = valid.long().argmax().reshape(1)
    keep = valid.reshape(-1, *[1] * (y.dim() - 1))
    return torch.where(keep, y, y.index_select(0, first))


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def true_on_host(flag: Tensor) -> bool:
    """The value of a bool scalar that lies in host memory, read there.

    No operator is called: there is no device to wait for, and what watches a step for waits need not be told so.
    """
    return bool(ctypes.c_uint8.from_address(flag.data_ptr()).value)


class DeferredRefusal:
    """Targets that are known to be wrong on the device alone, kept until a step waits for it anyway.

    What is wrong did not count in its own step, so that nothing was learned from it.

    Attributes:
        first: Number of the first step with such a target, 0 if there was none; None if no device keeps it.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def note(
        self,
        wrong: Tensor,  # () bool
        step: int,
    ) -> None:
        """Keep what a mini-batch showed. Asks the device nothing."""
        now = wrong.long() * step
        self.first = now if self.first is None else torch.where(self.first > 0, self.first, now)

    @property
    def fine(self) -> Tensor | None:
        """() bool on the device, or None where everything was looked at on the host."""
        return None if self.first is None else self.first == 0

    def refuse(self) -> None:
        """Refuse what was kept. Waits for the device.

        Raises:
            DataError: There was a wrong target.
        """
        first = 0 if self.first is None else int(self.first)
        if first:
            self.first = None
            raise DataError(
                f"targets: the mini-batch of step {first} held targets that are out of range or not finite, or none "
                "that counts; they were left out of that step. Look at the data of that mini-batch"
            )
