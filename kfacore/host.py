"""Where numbers lie: on the host reading one costs nothing, on a device everything before it has to be waited for."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_free"]


def is_free(value: Tensor) -> bool:
    """Whether reading a number costs no wait."""
    return value.device.type == "cpu"
