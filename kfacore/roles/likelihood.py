r"""The role of a likelihood: the predictive distribution p(y | z) with natural parameters z.

Conventions: z has shape (n, o), the first dimension is the case; nll sums over outputs and is not averaged over cases.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from kfacore.roles.base import Part
from kfacore.schema.slots import LikelihoodConfig

__all__ = ["Likelihood"]


class Likelihood(Part):
    """A predictive distribution in its natural parameters, with its Fisher metric (method, section 1).

    `sample` is the only place in the project where targets are drawn.
    """

    config: LikelihoodConfig

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
