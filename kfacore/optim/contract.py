"""Where `KFAC` cannot be called as other optimizers of torch are: one sentence each, which says what to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import ConfigError, DataError
from kfacore.network import MicroBatches

__all__ = ["require_batch", "require_model", "united"]

_GUEST = "for a loop of loss.backward() and step(), use kfacore.Preconditioned around any optimizer"


def require_model(model: Any) -> None:
    """The model itself, since its layers are looked at.

    Raises:
        ConfigError: It is something else, its parameters for example.
    """
    if isinstance(model, nn.Module):
        return
    found = f"a {type(model).__name__}"
    if isinstance(model, Tensor | Sequence | Mapping) or hasattr(model, "__next__"):
        found += ", perhaps its parameters"
    raise ConfigError(
        "KFAC takes the model itself, whose layers it looks at: write KFAC(model, likelihood=...); to train only some "
        f"parameters, freeze the others first with requires_grad_(False). Found {found}"
    )


def require_batch(optimizer: Any, inputs: Any, targets: Any, closure: Any) -> None:
    """A step has its mini-batch.

    Raises:
        ConfigError: It was called without, with a closure, or by a GradScaler.
    """
    if hasattr(optimizer, "grad_scale"):  # a GradScaler leaves both at an optimizer that scales by itself
        del optimizer.grad_scale, optimizer.found_inf
        raise ConfigError(
            "KFAC needs no GradScaler, for it runs its passes in float32, or in bfloat16 with autocast='bfloat16', "
            "whose range needs no scaling: call optimizer.step(inputs, targets), or build the scaler with enabled=False"
        )
    if closure is not None or (callable(inputs) and targets is None):
        raise ConfigError(
            "KFAC cannot use a closure, which hides the model's outputs: write optimizer.step(inputs, targets), "
            f"which runs forward and backward passes by itself and returns the loss in its report; {_GUEST}"
        )
    if inputs is None:
        raise ConfigError(
            "KFAC.step needs the mini-batch: write optimizer.step(inputs, targets), in place of zero_grad, "
            f"loss.backward and step; {_GUEST}"
        )
    if targets is None and not _pairs(inputs):
        raise ConfigError(
            "KFAC.step needs targets beside the inputs: optimizer.step(inputs, targets), or a list of micro-batches, "
            "optimizer.step([(inputs, targets), ...])"
        )


def _pairs(inputs: Any) -> bool:
    """Whether it is a list of micro-batches."""
    if not isinstance(inputs, list | tuple) or not inputs:
        return False
    return all(isinstance(each, list | tuple) and len(each) in (2, 3) for each in inputs)


def united(batches: Sequence[Sequence[Any]], cases: Callable[[Any, Any], int]) -> tuple[MicroBatches, Any, Any]:
    """The inputs of micro-batches, and the targets and masks of all of them.

    Args:
        batches: ``(inputs, targets)`` or ``(inputs, targets, valid)`` of each.
        cases: Counts the cases of inputs and targets.

    Raises:
        DataError: Some have a mask and some have none, or targets do not fit each other.
    """
    masks = [batch[2] if len(batch) == 3 else None for batch in batches]
    missing = [i for i, mask in enumerate(masks) if mask is None]
    if 0 < len(missing) < len(masks):
        raise DataError(f"micro-batch {missing[0]} has no valid, others have one: give it to all, or to none")
    inputs = MicroBatches([batch[0] for batch in batches], [cases(batch[0], batch[1]) for batch in batches])
    targets = _joined([batch[1] for batch in batches], "targets")
    return inputs, targets, None if missing else _joined(masks, "valid")


def _joined(nests: Sequence[Any], what: str) -> Any:
    """Tensors of the same place one after another."""
    first = nests[0]
    if isinstance(first, Mapping):
        return {key: _joined([nest[key] for nest in nests], what) for key in first}
    if isinstance(first, list | tuple):
        return [_joined([nest[i] for nest in nests], what) for i in range(len(first))]
    if first is None:
        return None
    for index, each in enumerate(nests):
        if not isinstance(each, Tensor) or each.dim() == 0:
            raise DataError(f"{what} of micro-batch {index}: a tensor with one entry an example is needed")
        if each.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{what}: micro-batch 0 has {tuple(first.shape[1:])} an example, micro-batch {index} "
                f"{tuple(each.shape[1:])}; pad them to one length, and say with valid which positions count"
            )
    return torch.cat(list(nests))
