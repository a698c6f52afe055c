"""From observed outputs to the vectors that are sent back, with or without the targets of the mini-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.optim.joint import Joint
from kfacore.optim.layout import Layout
from kfacore.optim.loss import Loss, Total
from kfacore.roles.estimator import Estimator

__all__ = ["sampled_targets", "vectors_of"]


def sampled_targets(
    loss: Loss | Joint,
    z: Tensor,  # (n, ..., o)
    valid: Any,
    estimator: Estimator,
    generator: torch.Generator,
) -> Tensor:
    """Targets that stand for those that were not given, where nothing depends on them but their form.

    Raises:
        ConfigError: Something does: the estimator, weights of classes, several heads.
    """
    criterion = None if isinstance(loss, Joint) else loss.likelihood.criterion
    weighted = any(getattr(criterion, name, None) is not None for name in ("weight", "pos_weight"))
    if isinstance(loss, Joint) or weighted or estimator.config.kind == "empirical":
        why = "several heads" if isinstance(loss, Joint) else "weights" if weighted else "estimator 'empirical'"
        raise ConfigError(f"observe(z) needs targets here, because of {why}: observe(z, targets)")
    layout = _layout(z, valid, second=loss.likelihood.class_second)
    y = loss.likelihood.sample(layout.to_rows(z.float() if z.dtype in _HALF else z), generator)
    if y.dim() > 1:
        return layout.from_rows(y)
    return y.view(len(z), *layout.positions)


_HALF = (torch.float16, torch.bfloat16)


def _layout(z: Tensor, valid: Any, *, second: bool) -> Layout:
    """Where the numbers of a position stand, by the mask where that tells it."""
    if z.dim() == 2:
        return Layout((), z.shape[1])
    last, other = Layout(tuple(z.shape[1:-1]), z.shape[-1]), Layout(tuple(z.shape[2:]), z.shape[1], second=True)
    if isinstance(valid, Tensor) and valid.dim() > 1 and last.positions != other.positions:
        second = tuple(valid.shape[1:]) == other.positions
    return other if second else last


def vectors_of(
    loss: Loss | Joint,
    z: Tensor,  # (n, ..., o)
    targets: Any,
    valid: Any,
    estimator: Estimator,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Total]:
    """What the estimator sends back, (k, n, ..., o), zero beyond its cases; positions that count; S.

    Signs are drawn for every case and position: their products vanish in the mean, whatever the vectors are and
    whatever mixes cases in the model.
    """
    whole = z.detach().to(dtype)
    bound = loss.bind([whole], targets, valid, where="observe: targets")
    n = estimator.cases(len(z))
    first = whole[:n]
    vectors = bound.statistics(first, estimator, generator)
    signs = torch.randint(0, 2, first.shape[:-1], generator=generator, device=generator.device)
    vectors = vectors * (2 * signs - 1).to(first).unsqueeze(-1)
    if n < len(z):
        vectors = torch.cat([vectors, vectors.new_zeros(len(vectors), len(z) - n, *vectors.shape[2:])], 1)
    return vectors, bound.valid, bound.total(n)
