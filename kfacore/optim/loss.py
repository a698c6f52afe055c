r"""What a model is trained on: a likelihood, bound to the layout of outputs and to what its sums are divided by.

    h = (1/S) sum over rows of weight * nll(z, target) + eta/2 ||theta||^2,      F = (1/S) sum over rows of J^T F_R J,

a row one position of one example, z (n, ..., o) one vector of natural parameters a position (torch's class-second
layout (n, c, ...) is read too), ``valid`` (n, ...) the positions that count, S the number of examples or of valid
positions. Everything that leaves here has the shape of z and is zero at positions that do not count, whatever the model
returned there. A likelihood sees rows only.

For z (n, o) without a mask or options these are the paper's means over cases, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.comparison import compare
from kfacore.optim.guards import check_form
from kfacore.optim.layout import Layout, find_layout
from kfacore.optim.targets import DeferredRefusal, as_mask, fill_invalid, on_host, true_on_host
from kfacore.registry import get_registry
from kfacore.roles.criterion import is_criterion, read_criterion
from kfacore.roles.likelihood import Likelihood, Terms

__all__ = ["Loss"]


class Loss:
    """A likelihood as an optimizer uses it.

    Args:
        likelihood: The likelihood.

    Attributes:
        likelihood: The likelihood.
        per: What S counts: ``"example"``, ``"position"``, or ``"batch"``, which is counted as one.
        deferred: Targets that only the device knows to be wrong, until somebody waits for it.
        shared: Whether mini-batches are parts of those that several processes share: then nothing may count in one.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.per: str = likelihood.config.per or likelihood.per
        self.deferred = DeferredRefusal()
        self.shared = False
        self._form: tuple[Any, ...] | None = None
        self._second = likelihood.class_second
        self._compared = likelihood.criterion is None

    @classmethod
    def of(cls, value: Any) -> Loss:
        """From what a user may write for a likelihood: a name, a table, a config object, an instance, a loss of torch.

        Raises:
            ConfigError: It is none of these.
        """
        if isinstance(value, Loss):
            return value
        if is_criterion(value):
            return cls(read_criterion(value))
        return cls(get_registry().build("likelihood", value))

    @classmethod
    def untargeted(cls, likelihood: Likelihood, cases: int, outputs: int) -> BoundLoss:
        """The loss of outputs (n, o) without targets, as far as none are needed: for the metric."""
        nothing = torch.empty(0)
        return BoundLoss(cls(likelihood), Layout((), outputs), cases, nothing, Terms(nothing))

    def pack(self, outputs: Any) -> Any:
        """What is linearised of what the model returns: z itself; several heads become one tensor (see `Joint`)."""
        return outputs

    def bind(
        self, outputs: Sequence[Tensor], targets: Any, valid: Any = None, *, where: str = "targets", step: int = 0
    ) -> BoundLoss:
        """The loss of one mini-batch.

        Targets are checked wholly when their form is new, and the values of all rows in every mini-batch. On a CPU a
        wrong one is refused at once. An accelerator is not waited for: there such a row does not count, and `deferred`
        refuses it in the next step that waits anyway.

        Args:
            outputs: z in chunks, in the order of the cases, (n_c, ..., o) each.
            targets: Class numbers (n, ...), or one number an output, shaped as z.
            valid: Positions that count, (n, ...) or (n,), bool or 0 and 1; all if left out.
            where: What the targets are called in messages.
            step: Number of the step, for a refusal that comes later.

        Raises:
            DataError: The targets do not fit the outputs or are out of range, or no position counts.
            ConfigError: The value differs from that of the loss of torch that was given.
        """
        z = outputs[0]
        cases = sum(len(chunk) for chunk in outputs)
        check_form(targets, cases, z.device)
        targets = targets.detach()  # constants: a graph behind them would be carried into the gradient
        mask = None if valid is None else as_mask(valid, cases, z.device)
        layout, sure = find_layout(z, targets, mask, prefer_second=self._second, where=where)
        if sure and layout.positions and tuple(targets.shape[1:]) == layout.positions:
            self._second = layout.second  # kept, for a mini-batch whose shapes leave it open
        counts = None if mask is None else layout.mask_rows(mask)
        y, bad = self._checked(layout.target_rows(targets), counts, layout, z, where)
        terms = self.likelihood.terms(y, layout.outputs, z)
        if not terms.target.is_floating_point():  # class numbers, in range whatever the targets are
            y = terms.target
        if terms.counts is not None:
            counts = terms.counts if counts is None else counts & terms.counts
        bound = BoundLoss(self, layout, cases, y, terms, counts, bad)
        self._require_rows(bound, where, step)
        if not self._compared and not (self.shared and not bound.weight()):
            self._compared = True
            compare(bound, outputs, targets, masked=valid is not None)
        return bound

    def _checked(
        self, y: Tensor, counts: Tensor | None, layout: Layout, z: Tensor, where: str
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of targets in the dtypes that likelihoods take, and on an accelerator which of them are wrong."""
        outputs = layout.outputs
        if y.is_floating_point() and y.dtype.itemsize == 1:  # torch can do next to nothing with 8 bits
            y = y.float()
        form = y.shape[1:], y.dtype, layout
        if counts is not None and len(y) == len(counts):
            y = fill_invalid(y if y.is_floating_point() else y.long(), counts)
        said = where if layout.rows == 1 else f"{where} (as rows, {layout.rows} positions an example)"
        new = form != self._form
        if new:
            self.likelihood.check_targets(y, outputs, said)
            self._form = form
        # The one place where labels of all kinds become int64: torch compares small integers in their own dtype.
        y = y.to(z.dtype) if y.is_floating_point() else y.long()
        if not on_host(y):
            return y, self.likelihood.unfit(y, outputs)
        if not new and true_on_host(self.likelihood.unfit(y, outputs).any()):
            self.likelihood.check_targets(y, outputs, said)
            raise DataError(f"{said}: {type(self.likelihood).__name__} finds values among them that it cannot take")
        return y, None

    def _require_rows(self, bound: BoundLoss, where: str, step: int) -> None:
        """Refuse a mini-batch in which nothing counts, or keep that for later."""
        nothing = None if bound.counts is None or self.shared else ~bound.counts.any()
        if on_host(bound.y):
            if nothing is not None and true_on_host(nothing):
                raise DataError(
                    f"{where}: no position of the mini-batch counts (all are masked or ignored), so its loss is 0 / 0; "
                    "leave such mini-batches out"
                )
        elif bound.bad is not None:
            wrong = bound.bad if bound.counts is None else bound.bad & bound.counts
            self.deferred.note(wrong.any() if nothing is None else wrong.any() | nothing, step)
