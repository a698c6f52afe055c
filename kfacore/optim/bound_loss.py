r"""The loss of one mini-batch as a function of its outputs z: value, residuals, Fisher, statistics (see `loss`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.optim.drawing import Share, drawn_part
from kfacore.optim.layout import Layout
from kfacore.optim.quadratic import fisher_gram, gram
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood, Terms

if TYPE_CHECKING:
    from kfacore.optim.loss import Loss

__all__ = ["BoundLoss", "Total"]

Total = float | Tensor
"""S: a number where the shapes tell it, a scalar on the device where a mask or weights do."""

_MOST_PASSES = 4096
"""More backward passes than this in one step are a mistake."""


@dataclass(frozen=True)
class BoundLoss:
    """The loss of one mini-batch, as a function of z.

    Methods that take z of fewer cases mean the first ones; S is then that of those.

    Attributes:
        loss: What bound it.
        layout: How z is read.
        cases: Number of cases.
        y: Targets as rows, (n R, ...).
        terms: What they come to.
        counts: Rows that count, (n R,); None is all.
        bad: Rows whose target is wrong, on an accelerator.
        given: S and the number that errors are divided by, of the mini-batch that several processes share: what sums
            over these cases are divided by, however many they are. Values and products are then shares of the whole's.
        whole: Cases of that mini-batch.
    """

    loss: Loss
    layout: Layout
    cases: int
    y: Tensor
    terms: Terms
    counts: Tensor | None = None
    bad: Tensor | None = None
    given: tuple[Total, Total] | None = None
    whole: int | None = None

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the rows."""
        return self.loss.likelihood

    @property
    def positions(self) -> int:
        """Positions of a case, R; masked ones too."""
        return self.layout.rows

    @cached_property
    def valid(self) -> Tensor | None:
        """Positions that count, (n, *positions), or None where all do."""
        return None if self.counts is None else self.counts.reshape(self.cases, *self.layout.positions)

    @cached_property
    def factor(self) -> float:
        """What every row's term is multiplied by."""
        return self.likelihood.factor(self.layout.outputs)

    @cached_property
    def _kept(self) -> Tensor | None:
        """Rows with a part in anything, (n R,)."""
        if self.bad is None:
            return self.counts
        return ~self.bad if self.counts is None else self.counts & ~self.bad

    def total(self, cases: int | None = None) -> Total:
        """S of the first cases, all if left out."""
        if self.given is not None:
            return self.given[0]
        total = self.weight(cases)
        if not isinstance(total, Tensor):
            return total
        return torch.where(total > 0, total, torch.ones_like(total)) if self._by_share else total.clamp(min=1)

    def weight(self, cases: int | None = None) -> Total:
        """What the first cases add to S, 0 where nothing counts."""
        n = self.cases if cases is None else cases
        if self.loss.per == "batch":
            return n / (self.whole or self.cases)
        if not self._by_share:
            return self._number(n)
        assert self.terms.share is not None
        rows = n * self.layout.rows
        share = self.terms.share[:rows].double()
        if self.counts is not None:
            share = torch.where(self.counts[:rows], share, torch.zeros_like(share))
        return share.sum()

    @property
    def _by_share(self) -> bool:
        return self.loss.per == "position" and self.terms.share is not None

    def _number(self, n: int) -> int | Tensor:
        """Examples or positions that count."""
        by_example = self.loss.per == "example"
        if self.counts is None:
            return n if by_example else n * self.layout.rows
        counts = self.counts[: n * self.layout.rows]
        return (counts.view(n, -1).any(1) if by_example else counts).sum()

    def numbers(self, cases: int) -> list[Total]:
        """What the first cases add to S and to the number of errors; processes sum them."""
        return [self.weight(cases), self._number(cases)]

    def part_of(self, whole: int) -> BoundLoss:
        """The same loss, of a part of a mini-batch with so many cases."""
        return replace(self, whole=whole)

    def with_numbers(self, numbers: Sequence[Total]) -> BoundLoss:
        """The same loss, divided by the sums of `numbers` over processes."""
        first, second = (n.clamp(min=1e-300) if isinstance(n, Tensor) else (n or 1) for n in numbers)
        return replace(self, given=(first, second))

    @property
    def plain(self) -> bool:
        """Whether this is the mean over cases of the likelihood of z (n, o), with nothing masked or weighted."""
        whole = self._kept is None and self.terms.weight is None and self.terms.target is self.y
        usual = self.factor == 1.0 and self.loss.per != "batch"
        return whole and usual and self.layout == Layout((), self.layout.outputs)

    def value(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # (), () float64
        """Loss and reported error at outputs z, in chunks; means, accumulated in double precision."""
        loss, error = self.sums(outputs)
        return loss / self.total(), error / self.counted

    @property
    def counted(self) -> Total:
        """Examples or positions that the error is the mean over."""
        if self.given is not None:
            return self.given[1]
        number = self._number(self.cases)
        return number.clamp(min=1) if isinstance(number, Tensor) else number

    def sums(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # (), () float64
        """The two means of `value` before they are divided, by `total` and by `counted`."""
        losses, errors = [], []
        for z, rows in self._chunks(outputs):
            losses.append(self._masked(self._row_losses(z, rows), rows).sum(dtype=torch.float64))
            errors.append(self._masked(self.likelihood.error(z, self.y[rows]), rows).sum(dtype=torch.float64))
        loss, error = _sum(losses), _sum(errors)
        return loss if self.factor == 1.0 else self.factor * loss, error

    def _row_losses(self, z: Tensor, rows: slice) -> Tensor:  # (N,)
        target, weight = self.terms.target[rows], self.terms.weight
        if weight is None:
            return self.likelihood.nll(z, target)
        if weight.dim() == 1:
            return weight[rows] * self.likelihood.nll(z, target)
        single = self.likelihood.nll(z.reshape(-1, 1), target.reshape(-1, 1))  # its outputs are independent
        return (weight[rows] * single.view(z.shape)).sum(-1)

    def residuals(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of the loss by z, for each chunk, shaped as z."""
        total = self.total()
        found = []
        for z, rows in self._chunks(outputs):
            r = self._weighted(self.likelihood.residual(z, self.terms.target[rows]), rows)
            found.append(self.layout.from_rows(self._masked(r, rows) / total))
        return found

    def statistics(
        self,
        z: Tensor,  # (n, ..., o)
        estimator: Estimator,
        generator: torch.Generator,
        part: Share | None = None,
    ) -> Tensor:  # (k, n, ..., o)
        """What the estimator sends back for the first cases; sums of squares are S times F_R: see `total`.

        Args:
            z: Outputs of the first cases.
            estimator: The estimator.
            generator: Source of every draw.
            part: Which of the first cases of a mini-batch that several processes share these are. The targets are then
                those that one process would draw for all of them.
        """
        rows = self.layout.to_rows(z)
        here = slice(0, len(rows))
        target = self.terms.target[here]
        if part is None:
            vectors = estimator.output_vectors(rows, target, self.likelihood, generator)
        else:
            vectors = drawn_part(estimator, rows, target, self.likelihood, generator, part, self.layout.rows)
        if self.layout.rows > 1 and not estimator.shares_passes:
            vectors = self._apart(vectors, estimator)
        return self.layout.from_rows(self._masked(self._weighted(vectors, here, root=True), here))

    def slopes(
        self,
        z: Tensor,  # (n, ..., o)
        Jv: Tensor,  # (k, n, ..., o)
    ) -> Tensor:  # (k,) float64
        """Derivative of the loss of the first cases along directions: (1/S) sum over rows of r^T J v."""
        rows = self.layout.to_rows(z)
        here = slice(0, len(rows))
        r = self._masked(self._weighted(self.likelihood.residual(rows, self.terms.target[here]), here), here)
        return (r * self.layout.to_rows(Jv, 1)).sum((1, 2), dtype=torch.float64) / self.total(len(z))

    def _apart(self, vectors: Tensor, estimator: Estimator) -> Tensor:  # (k, n R, o) -> (R k, n R, o)
        """A pass for each position: below the outputs, positions mix, and products of two would be counted.

        Raises:
            ConfigError: There would be too many.
        """
        R, k = self.layout.rows, len(vectors)
        if R * k > _MOST_PASSES:
            raise ConfigError(
                f"estimator '{estimator.config.kind}' needs {k} backward passes for each of {R} positions; use "
                "'monte-carlo', which needs one for all"
            )
        own = torch.eye(R, dtype=vectors.dtype, device=vectors.device)  # position r alone, for each r
        apart = own[:, None, None, :, None] * vectors.reshape(1, k, -1, R, self.layout.outputs)
        return apart.reshape(R * k, -1, self.layout.outputs)

    def fisher_product(
        self,
        z: Tensor,  # (n, ..., o)
        t: Tensor,  # (k, n, ..., o)
    ) -> Tensor:  # (k, n, ..., o)
        """F_R t / S on the first cases."""
        rows = self.layout.to_rows(z)
        return self.layout.from_rows(self._product(rows, self.layout.to_rows(t, 1)) / self.total(len(z)))

    def fisher_gram(
        self,
        z: Tensor,  # (n, ..., o)
        Jv: Tensor,  # (k, n, ..., o)
    ) -> Tensor:  # (k, k) float64
        """(1/S) sum over rows of (J v_i)^T F_R (J v_j) on the first cases, accumulated in double precision."""
        rows, total = self.layout.to_rows(z), self.total(len(z))
        Jv = self._masked(self.layout.to_rows(Jv, 1), slice(0, len(rows)))
        if self.terms.weight is None and self._kept is None and self.factor == 1.0 and total == len(rows):
            return fisher_gram(self.likelihood, rows, Jv)
        return gram(Jv, self._product(rows, Jv)) / total

    def _product(self, rows: Tensor, t: Tensor) -> Tensor:
        here = slice(0, len(rows))
        return self._masked(self._weighted(self.likelihood.fisher_product(rows, t), here), here)

    def _weighted(
        self,
        values: Tensor,  # ([k,] N, o)
        rows: slice,
        *,
        root: bool = False,
    ) -> Tensor:
        """Times the rows' weights and the factor, or times their roots."""
        weight = self.terms.weight
        if weight is not None:
            weight = weight[rows] if weight.dim() == 2 else weight[rows, None]
            values = values * (weight.sqrt() if root else weight)
        if self.factor != 1.0:
            values = values * (math.sqrt(self.factor) if root else self.factor)
        return values

    def _masked(
        self,
        values: Tensor,  # (N,) or ([k,] N, o)
        rows: slice,
    ) -> Tensor:
        """Zero in rows that do not count, also where there is no number."""
        if self._kept is None:
            return values
        kept = self._kept[rows]
        return torch.where(kept if values.dim() == 1 else kept[:, None], values, torch.zeros_like(values))

    def _chunks(self, outputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
        start = 0
        for z in outputs:
            rows = self.layout.to_rows(z)
            yield rows, slice(start, start + len(rows))
            start += len(rows)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
