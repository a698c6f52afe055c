"""Loss and error over a whole data set, and when they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfacore.compiler import uncompiled_mode
from kfacore.optim.loss import Loss
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.problem import Split

__all__ = ["Measure", "chunk_size", "evaluate", "evaluate_all", "evaluation_due", "spread"]

CHUNK = 5000
"""Most cases in one forward pass: enough for speed."""

NUMBERS = 2**25
"""Most numbers in any one tensor of a forward pass, 128 MB in float32: fewer cases go at once where each is large."""


def evaluation_due(step: int, every: int, *, early: bool) -> bool:
    """Whether an evaluation is due after a step. It depends on the step alone, so a resumed run does the same.

    Args:
        step: Steps taken, from 0.
        every: Steps between two evaluations; 0 is never.
        early: Whether 1, 2, 5, 10, 20, 50, ... below `every` count too. A curve that starts with one straight line over
            its first `every` steps hides the part in which most happens.
    """
    if every == 0:
        return False
    leading = str(step).rstrip("0")
    return step % every == 0 or (early and step < every and leading in ("1", "2", "5"))


@overload
def spread(split: Split, cases: int | None) -> Split: ...
@overload
def spread(split: Split | None, cases: int | None) -> Split | None: ...
def spread(split: Split | None, cases: int | None) -> Split | None:
    """So many cases at equal distances: data often lies sorted by class. All of them if there are no more.

    Args:
        split: The cases, if there are any.
        cases: How many; None for all.
    """
    if split is None or cases is None or cases >= len(split):
        return split
    places = torch.arange(cases, device=split.inputs.device) * len(split) // cases
    inputs = split.inputs.index_select(0, places)
    return Split(inputs, inputs if split.targets is split.inputs else split.targets.index_select(0, places))


@dataclass(frozen=True)
class Measure:
    """What a model does on a data set.

    Attributes:
        loss: The loss without weight decay: mean negative log-likelihood over cases, or what the likelihood's options
            make of it.
        error: Mean of the likelihood's error.
    """

    loss: float
    error: float


@torch.no_grad()
def evaluate(
    model: nn.Module, likelihood: Likelihood, split: Split, *, chunk: int | None = None, ranks: Ranks = ALONE
) -> Measure:
    """Mean loss and error of a model, in evaluation mode and without gradients.

    Args:
        model: The model; its training mode is restored.
        likelihood: The likelihood.
        split: The cases, on the model's device.
        chunk: Cases in one forward pass; by default as many as `chunk_size` says.
        ranks: Processes that divide the cases among themselves.

    Returns:
        The two means; sums over chunks are kept in double precision. One synchronisation.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    split = split if ranks.alone else _every(split, ranks)
    measured = Loss(likelihood)
    measured.shared = not ranks.alone
    total: Tensor | None = None
    divisors: Sequence[float | Tensor] = (0, 0)
    try:
        chunk = chunk or chunk_size(model, split.inputs)
        for start in range(0, len(split), chunk):
            z = model(split.inputs[start : start + chunk])
            bound = measured.bind([z], split.targets[start : start + chunk])
            sums = torch.stack(bound.sums([z]))
            total = sums if total is None else total + sums
            divisors = [a + b for a, b in zip(divisors, (bound.total(), bound.counted), strict=True)]
    finally:
        for module in training:  # each as it was: a user may keep parts of a model in evaluation mode
            module.training = True
    if not ranks.alone:
        flat = torch.zeros(4, dtype=torch.float64, device=split.inputs.device)
        if total is not None:
            flat = torch.cat([total, torch.stack([torch.as_tensor(d).to(total) for d in divisors])])
        (flat,) = ranks.sum("evaluation", [flat])
        total, divisors = flat[:2], list(flat[2:].unbind())
    if total is None:
        return Measure(float("nan"), float("nan"))
    if measured.per == "batch":  # a sum, over the whole set
        divisors = (1, divisors[1])
    loss, error = torch.stack([value / by for value, by in zip(total, divisors, strict=True)]).tolist()
    return Measure(loss, error)


def _every(split: Split, ranks: Ranks) -> Split:
    """One process's part of the cases."""
    inputs = split.inputs[ranks.rank :: ranks.size]
    return Split(inputs, inputs if split.targets is split.inputs else split.targets[ranks.rank :: ranks.size])


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Remembers the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers: int = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def chunk_size(model: nn.Module, inputs: Tensor) -> int:
    """Cases in one forward pass, `CHUNK` unless the largest tensor on the way would have more than `NUMBERS` numbers.

    Args:
        model: The model, in evaluation mode: one case is sent through it.
        inputs: The cases.
    """
    if len(inputs) <= 1:
        return 1
    with uncompiled_mode(_Largest()) as largest:
        model(inputs[:1])
    fits: int = NUMBERS // max(1, largest.numbers)
    return max(1, min(CHUNK, fits))


def evaluate_all(
    model: nn.Module,
    averaged: nn.Module | None,
    likelihood: Likelihood,
    train: Split,
    test: Split | None,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """The measures of an evaluation event, None where there is no test set or no average yet.

    Args:
        model: The model with the current parameters.
        averaged: The model with averaged parameters, if there is one.
        likelihood: The likelihood.
        train: Training cases.
        test: Test cases.
        ranks: Processes that divide the cases among themselves.

    Returns:
        ``train_loss``, ``train_error``, ``test_loss``, ``test_error`` and the same with ``averaged_`` in front.
    """
    result: dict[str, float | None] = {}
    for prefix, candidate in (("", model), ("averaged_", averaged)):
        for name, split in (("train", train), ("test", test)):
            measure = None
            if candidate is not None and split is not None:
                measure = evaluate(candidate, likelihood, split, ranks=ranks)
            result[f"{prefix}{name}_loss"] = None if measure is None else measure.loss
            result[f"{prefix}{name}_error"] = None if measure is None else measure.error
    return result
