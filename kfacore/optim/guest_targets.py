"""From observed outputs to the vectors that are sent back, with or without the targets of the mini-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.optim.bound_loss import Total
from kfacore.optim.drawing import Share
from kfacore.optim.joint import Joint
from kfacore.optim.layout import Layout
from kfacore.optim.loss import Loss
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.parallel.whole import Whole
from kfacore.roles.estimator import Estimator

__all__ = ["sampled_targets", "vectors_of"]


def sampled_targets(
    loss: Loss | Joint,
    z: Tensor,  # (n, ..., o)
    valid: Any,
    estimator: Estimator,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
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
    rows = layout.to_rows(z.float() if z.dtype in _HALF else z)
    part = part_of(len(z), len(z) * ranks.size, ranks)
    if part is None:
        y = loss.likelihood.sample(rows, generator)
    else:
        own, whole = part.rows(layout.rows)
        y = loss.likelihood.sample_part(rows, own.to(rows.device), whole, generator)
    if y.dim() > 1:
        return layout.from_rows(y)
    return y.view(len(z), *layout.positions)


def part_of(cases: int, first: int, ranks: Ranks) -> Share | None:
    """Which of the first cases of a mini-batch are here, if other processes have as many; None for one process.

    Nobody is asked: a loop may observe where others do not. Where parts differ in size, draws are not those of one
    process with the whole mini-batch, but as good.
    """
    return None if ranks.alone else Share(Whole((cases,) * ranks.size, ranks.rank), first, ALONE)


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
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor | None, Total]:
    """What the estimator sends back, (k, n, ..., o), zero beyond its cases; positions that count; S.

    Signs are drawn for every case and position: their products vanish in the mean, whatever the vectors are and
    whatever mixes cases in the model.
    """
    whole = z.detach().to(dtype)
    bound = loss.bind([whole], targets, valid, where="observe: targets")
    R = bound.positions
    part = part_of(len(z), estimator.cases(len(z) * ranks.size, R), ranks)
    n = estimator.cases(len(z), R) if part is None else part.whole.first(part.cases)
    first = whole[:n]
    if part is not None:
        bound = bound.part_of(part.whole.cases)
    vectors = bound.statistics(first, estimator, generator, part)
    vectors = vectors * _signs(first, generator, part)
    if n < len(z):
        vectors = torch.cat([vectors, vectors.new_zeros(len(vectors), len(z) - n, *vectors.shape[2:])], 1)
    return vectors, bound.valid, bound.total(n) if part is None else bound.weight(n)


def _signs(first: Tensor, generator: torch.Generator, part: Share | None) -> Tensor:
    """A sign for every case and position, in a dimension more."""
    if part is None:
        signs = torch.randint(0, 2, first.shape[:-1], generator=generator, device=generator.device)
    else:
        own, whole = part.rows(first.shape[1:-1].numel())
        signs = torch.randint(0, 2, (whole,), generator=generator, device=generator.device)[own.to(generator.device)]
        signs = signs.view(first.shape[:-1])
    return (2 * signs - 1).to(first).unsqueeze(-1)
