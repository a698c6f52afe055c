r"""The objective's exact quadratic model around the parameters, and steps that are taken on it.

    model(delta) = 1/2 delta^T A delta + grad^T delta,      A = F + lambda D + eta I,

D is I, or what `kfacore.optim.units` measures parameters with, F the exact Fisher on the first cases of a mini-batch
(method, section 4; paper, sections 6.4 and 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from kfacore.network import Accumulated, BlockVector, Linearization
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.joint import BoundJoint
from kfacore.optim.loss import Loss
from kfacore.optim.quadratic import model_value, on_planes, symmetric_gram
from kfacore.optim.units import Units
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.momentum import Momentum

__all__ = ["LocalModel", "Solver", "combine"]


class Solver(Protocol):
    """What preconditions: an `Inverse`, or anything that is applied like one."""

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """F-hat^-1 v written over ``out``."""


class LocalModel:
    """The quadratic model on the first cases of one linearised mini-batch.

    Args:
        batch: The mini-batch; the parameters must not have moved since.
        loss: What turns its outputs into F_R: the mini-batch's loss, or a likelihood of outputs (n, o) that is averaged
            over cases.
        grad: The objective's gradient.
        lam: lambda.
        eta: Weight decay.
        cases: How many of the first cases F is the mean of.
        own: theta, if the slope along the directions is to be that of these cases too, mean of r^T J v + eta theta^T v
            with the residual r; left out, it is that of the gradient.
        ranks: The processes that share the mini-batch: the loss gives this one's share, which they add up.
        units: D, and the coordinates of F-hat; those of the parameters if left out.

    Attributes:
        grad: The gradient.
        J: J v of the directions that `planes` saw last, (k, n, o).
    """

    def __init__(
        self,
        batch: Linearization | Accumulated,
        loss: BoundLoss | BoundJoint | Likelihood,
        grad: BlockVector,
        lam: Tensor,
        eta: float,
        cases: int,
        own: Sequence[Tensor] | None = None,
        ranks: Ranks = ALONE,
        units: Units | None = None,
    ) -> None:
        self._ranks = ranks
        self._units = units or Units()
        self.grad = grad
        self.J = lam.new_empty(0)
        self._batch = batch
        self._given = loss
        self._lam, self._eta = lam, eta
        self._cases, self._own = cases, own
        self._before = lam.new_full((2,), torch.nan)

    @cached_property
    def _z(self) -> Tensor:
        """Outputs of the cases; formed only where the model is used."""
        outputs = self._batch.outputs()
        z = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return z[: self._cases]

    @cached_property
    def _loss(self) -> BoundLoss | BoundJoint:
        given = self._given
        if isinstance(given, Likelihood):
            return Loss.untargeted(given, len(self._z), self._z.shape[-1])
        return given

    def push(self, directions: Sequence[BlockVector]) -> Tensor:  # (k, n, o)
        """J v for each direction, in one pass; of no cases where all are other processes'."""
        if self._cases == 0:
            return self._z.new_zeros(len(directions), *self._z.shape)
        return self._batch.jvp([v.blocks for v in directions], self._cases)

    def planes(
        self, directions: Sequence[BlockVector], *, last: bool, J: Tensor | None = None, grad: BlockVector | None = None
    ) -> tuple[Tensor, Tensor]:  # (c, 2, 2), (c, 2)
        """M and b on (v_i, v_k) for each of k directions but the last; on v_i alone, padded by zeros, if told so.

        Args:
            directions: v_1..v_k.
            last: Whether the last direction is common to all planes.
            J: J v of the directions, (k, n, o), if it is known.
            grad: The model's gradient where the planes begin, if that is not zero.
        """
        with self._ranks.together("quadratic model"):
            self.J = self.push(directions) if J is None else J
            gram = self._loss.fisher_gram(self._z, self.J)
        (gram,) = self._ranks.sum("quadratic model", [gram])
        inner = symmetric_gram(lambda i, j: torch.dot(directions[i].flat, directions[j].flat), len(directions))
        M = gram + self._damped(directions, inner)
        b = self._slopes(directions, self.grad if grad is None else grad, beginning=grad is None)
        if last and grad is None:
            self._before = torch.stack([b[-1], gram[-1, -1] + self._eta * inner[-1, -1]])
        if not last:
            M = nn.functional.pad(M, (0, 1, 0, 1))
            b = nn.functional.pad(b, (0, 1))
        return on_planes(M, b)

    def _damped(self, directions: Sequence[BlockVector], inner: Tensor) -> Tensor:  # (k, k)
        """v_i^T (lambda D + eta I) v_j, from v_i^T v_j."""
        if self._units.metric is None:
            return (self._lam + self._eta) * inner
        products = {}
        for j, v in enumerate(directions):
            scaled = v.flat * self._units.metric
            products.update({(i, j): torch.dot(directions[i].flat, scaled) for i in range(j + 1)})
        measured = symmetric_gram(lambda i, j: products[min(i, j), max(i, j)], len(directions))
        return self._lam * measured + self._eta * inner

    def _slopes(self, directions: Sequence[BlockVector], grad: BlockVector, *, beginning: bool) -> Tensor:  # (k,)
        """Derivative of h along each direction."""
        if self._own is None or not beginning:
            return torch.stack([torch.dot(v.flat, grad.flat) for v in directions]).double()
        (slopes,) = self._ranks.sum("slopes", [self._loss.slopes(self._z, self.J)])
        if not self._eta:
            return slopes
        return slopes + self._eta * torch.stack([_inner(self._own, v.parts) for v in directions])

    def before(self) -> Tensor:  # (2,) float64
        """Slope and curvature along the step before: b_v and v^T (F + eta I) v for v, the last direction.

        NaN where there was no such direction.
        """
        return self._before

    def fisher_product(
        self,
        Jdelta: Tensor,  # (n, o)
        out: BlockVector,
    ) -> BlockVector:
        """F delta = J^T F_R J delta / S, written into ``out``: one backward pass."""
        self._batch.pull_back(self._loss.fisher_product(self._z, Jdelta.unsqueeze(0))[0], out)
        self._ranks.sum_into("F delta", out.flat)
        return out

    def gradient_at(
        self,
        delta: BlockVector,
        Jdelta: Tensor,  # (n, o)
        out: BlockVector,
    ) -> BlockVector:
        """A delta + grad, written into ``out``: one backward pass."""
        self.fisher_product(Jdelta, out)
        damping, metric = (self._lam + self._eta).to(delta.flat.dtype), self._units.metric
        if metric is not None:
            damping = self._lam.to(metric) * metric + self._eta
        out.flat.add_(self.grad.flat).addcmul_(delta.flat, damping)
        return out

    def go_on(
        self,
        delta: BlockVector,
        Jdelta: Tensor,  # (n, o)
        inverse: Solver,
        momentum: Momentum,
        times: int,
        buffers: Sequence[BlockVector],
        enough: Callable[[BlockVector], bool] | None = None,
    ) -> Tensor:
        """Further steps of K-FAC on the model itself, from delta on: conjugate gradients, preconditioned by F-hat.

        Each has Delta = -F-hat^-1 (A delta + grad), and the step before it as its previous one; with coefficients that
        minimise the model the steps are conjugate. Martens (2010, sections 4.1 and 4.7) preconditions with a diagonal.

        Args:
            delta: The step so far; receives the further ones.
            Jdelta: J delta.
            inverse: F-hat^-1.
            momentum: What chooses the coefficients.
            times: How many steps.
            buffers: Three vectors to work in.
            enough: Asked before each step, with A delta + grad where it begins; true ends the search.

        Returns:
            The change of the model, a scalar.
        """
        residual, proposal, last = buffers
        last.flat.copy_(delta.flat)
        Jlast = Jdelta
        change = self._lam.new_zeros((), dtype=torch.float64)
        for _ in range(times):
            self.gradient_at(delta, Jdelta, residual)
            if enough is not None and enough(residual):
                break
            self._units.solve(inverse.solve_into, residual, proposal)
            proposal.flat.neg_()
            J = torch.cat([self.push([proposal]), Jlast.unsqueeze(0)])  # J is linear: that of the last step is known
            moving = momentum.uses_previous
            M, b = self.planes(
                [proposal, last] if moving else [proposal], last=moving, J=J if moving else J[:1], grad=residual
            )
            x = momentum.coefficients(M, b)
            change = change + model_value(M, b, x)[0]
            alpha, mu = x[0]
            last.combine(mu, proposal, alpha)
            Jlast = combine(alpha, J[0], mu, J[1])
            delta.flat.add_(last.flat)
            Jdelta = Jdelta + Jlast
        return change


def _inner(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:  # () float64
    """Inner product of two lists of tensors."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(u, v, strict=True)]).sum()


def combine(alpha: Tensor, u: Tensor, mu: Tensor, v: Tensor) -> Tensor:
    """Alpha u + mu v in the vectors' dtype."""
    return alpha.to(u.dtype) * u + mu.to(u.dtype) * v
