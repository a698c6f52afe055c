r"""Several heads trained together: losses and Fishers add.

    h = sum over heads of weight_j * loss_j + eta/2 ||theta||^2,      F_R = blockdiag(weight_j F_R of head j).

A model returns its heads in a dict or a tuple; targets (and masks) come in the same nest. Linearised is one tensor
(n, D) with the numbers of all heads side by side, so that the network knows nothing of heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import ConfigError, DataError
from kfacore.optim.bound_loss import BoundLoss, Total
from kfacore.optim.drawing import Share
from kfacore.optim.loss import Loss
from kfacore.optim.targets import DeferredRefusal
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood

__all__ = ["BoundJoint", "Joint", "joint_or_loss"]

Key = str | int


class Joint:
    """The loss of a model with several heads, in place of a likelihood.

    Args:
        heads: A likelihood, in any form, for each head of the model's dict or tuple.
        weights: Factor of each head's loss; 1 where left out.

    Raises:
        ConfigError: No heads, or weights of heads that are not there or not positive.

    Example:
        ``KFAC(model, likelihood=Joint({"class": nn.CrossEntropyLoss(), "box": "gaussian"}))``
    """

    def __init__(
        self,
        heads: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        self.heads: dict[Key, Loss] = {key: Loss.of(value) for key, value in _items(heads)}
        given = {} if weights is None else dict(_items(weights))
        wrong = [key for key, value in given.items() if key not in self.heads or not 0 < float(value) < math.inf]
        if not self.heads or wrong:
            known = ", ".join(map(str, self.heads)) or "none"
            raise ConfigError(f"Joint: heads are {known}; weights must be positive numbers of these, found {given}")
        self.weights = {key: float(given.get(key, 1.0)) for key in self.heads}
        self._shapes: dict[Key, torch.Size] = {}
        self.deferred = DeferredRefusal()
        for loss in self.heads.values():
            loss.deferred = self.deferred

    @property
    def shared(self) -> bool:
        """See `Loss`."""
        return all(loss.shared for loss in self.heads.values())

    @shared.setter
    def shared(self, value: bool) -> None:
        for loss in self.heads.values():
            loss.shared = value

    @property
    def likelihood(self) -> Likelihood:
        """That of the first head."""
        return next(iter(self.heads.values())).likelihood

    def pack(self, outputs: Any) -> Tensor:  # (n, D)
        """The heads of the model's outputs side by side.

        Raises:
            DataError: A head is missing or is no tensor.
        """
        parts = []
        for key, z in self._of_heads(outputs, "the model's outputs").items():
            if not isinstance(z, Tensor) or z.dim() == 0:
                raise DataError(f"the model's outputs: head {key!r} must be a tensor, found a {type(z).__name__}")
            self._shapes[key] = z.shape[1:]
            parts.append(z.flatten(1) if z.dim() > 1 else z.unsqueeze(1))
        return torch.cat(parts, 1)

    def unpack(
        self,
        packed: Tensor,  # ([k,] n, D)
        leading: int = 0,
    ) -> dict[Key, Tensor]:
        """Each head's part, in the shape in which the model returned it."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = torch.split(packed, sizes, dim=leading + 1)
        lead = packed.shape[: leading + 1]
        return {key: part.reshape(*lead, *self._shapes[key]) for key, part in zip(self._shapes, parts, strict=True)}

    def bind(
        self, outputs: Sequence[Tensor], targets: Any, valid: Any = None, *, where: str = "targets", step: int = 0
    ) -> BoundJoint:
        """The loss of one mini-batch; see `Loss.bind`.

        Args:
            outputs: What `pack` made, in chunks.
            targets: In a dict or tuple, as the heads.
            valid: Masks of heads that have one, in a dict, or a tuple with None for the others.
            where: What the targets are called in messages.
            step: Number of the step.
        """
        chunks = [self.unpack(chunk) for chunk in outputs]
        y = self._of_heads(targets, where)
        masks = {} if valid is None else dict(_items(valid))
        bound = {
            key: loss.bind(
                [chunk[key] for chunk in chunks], y[key], masks.get(key), where=f"{where} of head {key!r}", step=step
            )
            for key, loss in self.heads.items()
        }
        return BoundJoint(self, bound, sum(len(chunk) for chunk in outputs))

    def _of_heads(self, nest: Any, what: str) -> dict[Key, Any]:
        items = dict(_items(nest)) if isinstance(nest, Mapping | list | tuple) else None
        if items is None or any(key not in items for key in self.heads):
            found = f"a {type(nest).__name__}" if items is None else ", ".join(map(str, items)) or "none"
            raise DataError(f"{what}: heads {', '.join(map(str, self.heads))} are needed, found {found}")
        return {key: items[key] for key in self.heads}


@dataclass(frozen=True)
class BoundJoint:
    """The loss of one mini-batch with several heads; the methods are those of `BoundLoss`.

    S is the number of cases: what a head is divided by otherwise is in its weight.

    Attributes:
        loss: What bound it.
        heads: Each head's loss.
        cases: Number of cases.
    """

    loss: Joint
    heads: dict[Key, BoundLoss]
    cases: int

    valid: None = None
    """No mask belongs to all heads; each head's own is in what leaves here."""

    given: Total | None = None
    """S of the mini-batch that several processes share, see `BoundLoss.given`."""

    @property
    def positions(self) -> int:
        """Positions of a case in the head that has the fewest."""
        return min(bound.positions for bound in self.heads.values())

    def total(self, cases: int | None = None) -> Total:
        """S, the number of cases."""
        return self.weight(cases) if self.given is None else self.given

    def weight(self, cases: int | None = None) -> int:
        """What the first cases add to S."""
        return self.cases if cases is None else cases

    def numbers(self, cases: int) -> list[Total]:
        """The number of cases, and those of each head; processes sum them."""
        return [cases, *(number for bound in self.heads.values() for number in bound.numbers(cases))]

    def part_of(self, whole: int) -> BoundJoint:
        """The same loss, of a part of a mini-batch with so many cases."""
        return replace(self, heads={key: bound.part_of(whole) for key, bound in self.heads.items()})

    def with_numbers(self, numbers: Sequence[Total]) -> BoundJoint:
        """The same loss, divided by the sums of `numbers` over processes."""
        pairs = zip(numbers[1::2], numbers[2::2], strict=True)
        heads = {key: self.heads[key].with_numbers(pair) for key, pair in zip(self.heads, pairs, strict=True)}
        return replace(self, heads=heads, given=numbers[0])

    def value(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # (), () float64
        """The weighted sum of the heads' losses, and the sum of their errors."""
        chunks = [self.loss.unpack(chunk) for chunk in outputs]
        values = [(self.loss.weights[key], *b.value([chunk[key] for chunk in chunks])) for key, b in self.heads.items()]
        losses, errors = [w * loss for w, loss, _ in values], [error for _, _, error in values]
        return torch.stack(losses).sum(), torch.stack(errors).sum()

    def residuals(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of the loss by what `Joint.pack` made, for each chunk."""
        chunks = [self.loss.unpack(chunk) for chunk in outputs]
        by_head = {key: bound.residuals([chunk[key] for chunk in chunks]) for key, bound in self.heads.items()}
        weighted = {key: [self.loss.weights[key] * r for r in found] for key, found in by_head.items()}
        return [_side_by_side([found[i] for found in weighted.values()]) for i in range(len(outputs))]

    def statistics(
        self, z: Tensor, estimator: Estimator, generator: torch.Generator, part: Share | None = None
    ) -> Tensor:  # (k, n, D)
        """What the estimator sends back. One set of passes for all heads where their vectors are uncorrelated.

        Otherwise each head has passes of its own: sums over passes of products of two heads must vanish.
        """
        parts = []
        for key, own in self.loss.unpack(z).items():
            vectors = self.heads[key].statistics(own, estimator, generator, part)
            parts.append(self._root(key, len(z)) * vectors)
        flat = [v.reshape(*v.shape[:2], -1) for v in parts]
        if estimator.shares_passes:
            return torch.cat(flat, 2)
        widths = [v.shape[2] for v in flat]
        padded = [torch.nn.functional.pad(v, (sum(widths[:i]), sum(widths[i + 1 :]))) for i, v in enumerate(flat)]
        return torch.cat(padded)

    def fisher_product(self, z: Tensor, t: Tensor) -> Tensor:  # (n, D), (k, n, D) -> (k, n, D)
        """F_R t / S on the first cases."""
        found = [self.loss.weights[key] * self.heads[key].fisher_product(own, u) for key, own, u in self._split(z, t)]
        return _side_by_side(found, 1)

    def fisher_gram(self, z: Tensor, Jv: Tensor) -> Tensor:  # (k, k) float64
        """The weighted sum of the heads' matrices."""
        grams = [self.loss.weights[key] * self.heads[key].fisher_gram(own, u) for key, own, u in self._split(z, Jv)]
        return torch.stack(grams).sum(0)

    def slopes(self, z: Tensor, Jv: Tensor) -> Tensor:  # (k,) float64
        """The weighted sum of the heads' derivatives along directions."""
        slopes = [self.loss.weights[key] * self.heads[key].slopes(own, u) for key, own, u in self._split(z, Jv)]
        return torch.stack(slopes).sum(0)

    def _split(self, z: Tensor, t: Tensor) -> Iterator[tuple[Key, Tensor, Tensor]]:
        own, moved = self.loss.unpack(z), self.loss.unpack(t, 1)
        for key in self.heads:
            yield key, own[key], moved[key]

    def _root(self, key: Key, cases: int) -> float | Tensor:
        """Root of a head's weight, times S / S_j where it is divided by another number."""
        total, weight, S = self.heads[key].total(cases), self.loss.weights[key], self.total(cases)
        if isinstance(total, Tensor):
            return (weight * S / total.double()).sqrt()
        return math.sqrt(weight * S / total)


def joint_or_loss(value: Any) -> Loss | Joint:
    """What `KFAC` takes for a likelihood: everything that `Loss.of` takes, or several heads."""
    return value if isinstance(value, Joint) else Loss.of(value)


def _items(nest: Any) -> Iterator[tuple[Key, Any]]:
    yield from nest.items() if isinstance(nest, Mapping) else enumerate(nest)


def _side_by_side(parts: Sequence[Tensor], leading: int = 0) -> Tensor:
    """Tensors ([k,] n, ...) as one, ([k,] n, D)."""
    return torch.cat([part.reshape(*part.shape[: leading + 1], -1) for part in parts], leading + 1)
