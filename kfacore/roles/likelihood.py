r"""The role of a likelihood: the predictive distribution p(y | z) with natural parameters z.

Conventions: z has shape (n, o), the first dimension is the case (a row: one position of one example); nll sums over
outputs and is not averaged over cases. Several positions, masks and the divisor are the business of
`kfacore.optim.loss.Loss`, which hands rows to the methods here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kfacore.roles.base import Part
from kfacore.schema.slots import LikelihoodConfig

__all__ = ["Likelihood", "Terms"]


@dataclass(frozen=True)
class Terms:
    r"""What targets come to: a row's term of the loss is weight * nll(z, target).

    Its gradient is weight * residual(z, target), and its Fisher metric sqrt(weight) F_R sqrt(weight): whatever a loss
    does to a likelihood that keeps its Hessian a multiple of F_R has this form (weights of classes or outputs, smoothed
    labels).

    Attributes:
        target: What `Likelihood.nll` and `Likelihood.residual` take.
        weight: (n,), or (n, o) for a likelihood whose outputs are independent, given y; 1 if left out.
        share: (n,) what a row adds to the divisor of a mean over positions; 1 if left out.
        counts: (n,) bool, rows that count; all if left out.
    """

    target: Tensor
    weight: Tensor | None = None
    share: Tensor | None = None
    counts: Tensor | None = None


class Likelihood(Part):
    """A predictive distribution in its natural parameters, with its Fisher metric (method, section 1).

    `sample` is the only place in the project where targets are drawn.

    Attributes:
        per: What the loss is divided by where the configuration does not say it.
        criterion: The torch loss that it was read from (`of`), or None.
        class_second: Whether outputs with positions have their classes in the second dimension where their shape
            leaves it open, as torch's cross-entropy has.
    """

    config: LikelihoodConfig
    per: ClassVar[Literal["example", "position"]] = "example"
    criterion: Any = None
    class_second: bool = False

    @classmethod
    def of(cls, criterion: Any, **options: Any) -> Likelihood:
        """The likelihood that a loss of torch is the negative logarithm of, with its options.

        Args:
            criterion: `torch.nn.CrossEntropyLoss`, `BCEWithLogitsLoss`, `MSELoss` or `GaussianNLLLoss`; its value is
                compared with ours on the first mini-batch.
            options: What the criterion does not hold, for example ``variance`` of `GaussianNLLLoss`.

        Raises:
            ConfigError: It is no such loss, or has options that no likelihood has; the message says what to do.
        """
        from kfacore.roles.criterion import read_criterion

        return read_criterion(criterion, **options)

    @abstractmethod
    def nll(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # (n, o) or (n,)
    ) -> Tensor:  # (n,)
        """Negative log-likelihood of each case, summed over outputs, differentiable in z, in a stable form."""

    @abstractmethod
    def mean(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (n, o)
        """The predictive mean E[y | z]; class probabilities for a categorical."""

    @abstractmethod
    def sample(
        self,
        z: Tensor,  # (n, o)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # like y
        """One target for each case, drawn from p(y | z) with the generator, which lives on the device of z."""

    def sample_part(
        self,
        z: Tensor,  # (n, o)
        own: Tensor,  # (n,) integers
        whole: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # like y
        """The targets that `sample` would draw for these cases among all those that several processes share.

        Args:
            z: Of these cases.
            own: Their places among all.
            whole: How many there are in all.
            generator: Moves as far as `sample` of all would move it.
        """
        placed = z.new_zeros((whole, *z.shape[1:]))
        placed[own] = z
        return self.sample(placed, generator)[own]

    @abstractmethod
    def residual(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # like a target
    ) -> Tensor:  # (n, o)
        """The derivative of `nll` by z in closed form (mean minus target): what the sampled pass sends back."""

    @abstractmethod
    def fisher_product(
        self,
        z: Tensor,  # (n, o)
        t: Tensor,  # (..., n, o)
    ) -> Tensor:  # (..., n, o)
        """F_R t for each case, F_R the Fisher metric of the output at z."""

    @abstractmethod
    def fisher_sqrt(
        self,
        z: Tensor,  # (n, o)
    ) -> Tensor:  # (k, n, o)
        """Vectors b_1..b_k for each case with F_R = sum over k of b_k b_k^T (the exact estimator sends them back)."""

    @abstractmethod
    def error(
        self,
        z: Tensor,  # (n, o)
        y: Tensor,  # like a target
    ) -> Tensor:  # (n,)
        """The error reported to people, per case: squared reconstruction error, or 1 where misclassified."""

    @abstractmethod
    def check_targets(
        self,
        y: Tensor,  # a whole data set's targets or one batch's
        outputs: int,
        where: str,
    ) -> None:
        """Refuse targets of the wrong shape, dtype or range, before any training.

        Args:
            y: Targets.
            outputs: The model's number of outputs, o.
            where: What the targets are called in the message, for example ``"y_train of data.npz"``.

        Raises:
            DataError: It says what was found, where, and what is needed.
        """

    def unfit(
        self,
        y: Tensor,  # (n, ...) targets of the right shape and dtype
        outputs: int,  # for likelihoods whose range depends on it
    ) -> Tensor:  # (n,) bool
        """Rows whose values `check_targets` refuses, without asking the device; it is looked at in every mini-batch.

        By default those that are not finite.
        """
        bad = ~y.isfinite()
        return bad.flatten(1).any(1) if bad.dim() > 1 else bad

    def terms(
        self,
        y: Tensor,  # (n, ...) targets that were checked, integers as int64
        outputs: int,  # for likelihoods with options
        like: Tensor,  # a tensor of the outputs' dtype and device
    ) -> Terms:
        """What targets come to, with the options of the configuration; by default they are taken as they are."""
        return Terms(y)

    def factor(self, outputs: int) -> float:
        """What the loss is multiplied by, its gradient and Fisher with it."""
        return self.config.scale

    def constant(self, outputs: int) -> float:
        """What torch's loss has besides ours, a row: constants that no gradient sees."""
        return 0.0
