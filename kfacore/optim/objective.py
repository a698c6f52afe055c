r"""The part of the objective h = loss + eta / 2 ||theta||^2 that needs no data; the loss is `kfacore.optim.loss`'s."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["penalty"]


def penalty(parameters: list[Tensor], eta: float) -> Tensor:  # () float64
    """Weight decay's part, eta / 2 ||theta||^2, accumulated in double precision."""
    if eta == 0.0:
        return parameters[0].new_zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(parameters)
    return 0.5 * eta * torch.stack(norms).double().square().sum()
