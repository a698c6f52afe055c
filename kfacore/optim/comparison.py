"""The user's own loss beside ours on the first mini-batch: a wrong reading of it must not train anything."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfacore.errors import ConfigError

if TYPE_CHECKING:
    from kfacore.optim.bound_loss import BoundLoss

__all__ = ["compare"]

_SLACK = 1000
"""Rounding that is tolerated, in units of the dtype's."""


@torch.no_grad()
def compare(bound: BoundLoss, outputs: Sequence[Tensor], targets: Tensor, *, masked: bool) -> None:
    """Refuse a loss of torch whose value is not ours. Waits for the device.

    Args:
        bound: Our loss of the mini-batch.
        outputs: z in chunks.
        targets: The targets as the user gave them.
        masked: Whether a mask was given beside them, which torch's losses do not know.

    Raises:
        ConfigError: The values differ; the message has both.
    """
    if masked:
        return
    criterion = bound.likelihood.criterion
    z = torch.cat(list(outputs))
    try:
        theirs = float(_call(criterion, bound, z, targets))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"likelihood: nn.{type(criterion).__name__} itself refuses the mini-batch: {reason}"
        ) from error
    constant = bound.factor * bound.likelihood.constant(bound.layout.outputs) * len(bound.y) / float(bound.total())
    ours = float(bound.value(outputs)[0]) + constant
    if abs(theirs - ours) > _SLACK * torch.finfo(z.dtype).eps * max(abs(theirs), abs(ours), 1.0):
        raise ConfigError(
            f"likelihood: nn.{type(criterion).__name__} gives {theirs:.8g} on the first mini-batch, the likelihood "
            f"that it was read as, '{bound.likelihood.config.kind}', {ours:.8g}; give the likelihood itself (a name or "
            "a table), or a plug-in's if the loss is your own"
        )


def _call(criterion: nn.Module, bound: BoundLoss, z: Tensor, targets: Tensor) -> Any:
    """The user's loss, in its own layout."""
    own = copy.deepcopy(criterion).to(device=z.device, dtype=z.dtype)
    y = targets.to(z.dtype) if targets.is_floating_point() else targets.long()
    if bound.layout.positions and not bound.layout.second and isinstance(criterion, nn.CrossEntropyLoss):
        z = z.movedim(-1, 1)
        y = y.movedim(-1, 1) if y.is_floating_point() else y
    if isinstance(criterion, nn.GaussianNLLLoss):
        return own(z, y, torch.full_like(z, getattr(bound.likelihood.config, "variance", 1.0)))
    return own(z, y)
