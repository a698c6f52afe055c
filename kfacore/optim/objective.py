r"""The objective h = mean loss + eta / 2 ||theta||^2, accumulated in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacore.roles.likelihood import Likelihood

__all__ = ["mean_losses", "penalty"]


def mean_losses(
    likelihood: Likelihood,
    outputs: Sequence[Tensor],  # (n_c, o) a chunk
    targets: Tensor,  # (sum of n_c, ...)
) -> tuple[Tensor, Tensor]:  # (), () float64
    """Mean loss and mean reported error of outputs that come in chunks."""
    losses, errors = [], []
    for z, y in zip(outputs, torch.split(targets, [len(z) for z in outputs]), strict=True):
        losses.append(likelihood.nll(z, y).sum(dtype=torch.float64))
        errors.append(likelihood.error(z, y).sum(dtype=torch.float64))
    return torch.stack(losses).sum() / len(targets), torch.stack(errors).sum() / len(targets)


def penalty(parameters: list[Tensor], eta: float) -> Tensor:  # () float64
    """Weight decay's part, eta / 2 ||theta||^2."""
    norms = torch._foreach_norm(parameters)
    return 0.5 * eta * torch.stack(norms).double().square().sum()
