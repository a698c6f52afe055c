"""From arrays to the tensors of a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kfacore.roles import Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["autoencoder_split", "intensities", "labelled_split"]


def intensities(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes to float32 in [0, 1], one row a case: (N, ...) -> (N, d)."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)


def autoencoder_split(values: NDArray[np.float32]) -> Split:
    """Inputs that are their own targets, the very same tensor."""
    inputs = torch.from_numpy(values)
    return Split(inputs, inputs)


def labelled_split(values: NDArray[np.float32], labels: NDArray[Any]) -> Split:
    """Inputs with class numbers, as 64-bit integers."""
    return Split(torch.from_numpy(values), torch.from_numpy(labels.astype(np.int64)))
