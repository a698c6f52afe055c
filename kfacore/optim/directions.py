r"""The vectors of a step, in buffers that are kept: grad h, the proposals -F-hat^-1 grad h, and the step before.

Fresh memory is dear to touch, so each is taken once, when the first forward pass has told the order of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kfacore.curvature.forest import nearest
from kfacore.curvature.joined import Joined
from kfacore.curvature.owned import preconditioner
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.network import Accumulated, BlockVector, Linearization
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.joint import BoundJoint
from kfacore.optim.local import LocalModel
from kfacore.optim.parts import Parts, require_alike
from kfacore.optim.phases import At
from kfacore.optim.units import Units
from kfacore.roles.inverse import Inverse, Notice

__all__ = ["Directions"]


class Directions:
    """Gradient, proposals and step of one optimizer, with the curvature that they are made with.

    Args:
        parts: The optimizer's parts.
        fill_grad: Whether the gradient of the loss is left in ``p.grad``, as ``loss.backward()`` leaves it.

    Attributes:
        preconditioner: Statistics and inverse; None before the first step, as the vectors.
        grad: grad h.
        delta: The last step.
        size: Number of parameters.
        fill_grad: As given.
        spare: Four vectors for steps of several iterations, once there was one.
        units: What the weights of each block are measured in.
    """

    def __init__(self, parts: Parts, *, fill_grad: bool = False) -> None:
        self._parts = parts
        self.fill_grad = fill_grad
        self.preconditioner: Preconditioner | None = None
        self.grad: BlockVector | None = None
        self.delta: BlockVector | None = None
        self.spare: list[BlockVector] = []
        self.units = Units()
        self.size = 0
        self._proposals: list[BlockVector] = []
        self._views: list[Tensor] | None = None

    def begin(self) -> None:
        """A step begins: parameters may have got other storage since the last one."""
        self._views = None

    def clear(self) -> None:
        """Forget all of it, and a refresh that is under way."""
        if self.preconditioner is not None:
            self.preconditioner.discard()
        self.preconditioner = self.grad = self.delta = None
        self._proposals, self.spare, self._views = [], [], None

    def prepare(self) -> Preconditioner:
        """The preconditioner, made when the first forward pass has told the order of the layers."""
        if self.preconditioner is None:
            parts, layers = self._parts, self._parts.linearizer.layers
            self.size = sum(parameter.numel() for parameter in parts.linearizer.parameters)
            infos = [layer.info for layer in layers]
            like, decay = layers[0].parameters[0], parts.estimator.config.decay
            pairs = nearest(parts.linearizer.following)
            require_alike(parts)
            self.preconditioner = preconditioner(parts.approx, infos, like, decay, pairs, parts.ranks)
            self.grad, self.delta = self._vector(), self._vector()
        return self.preconditioner

    def curvature(self) -> Joined | None:
        """Who serves which blocks; None while the model's parameters are not initialised."""
        if self.preconditioner is not None:
            return self.preconditioner.joined
        linearizer = self._parts.linearizer
        infos = [layer.info for layer in linearizer.layers]
        return Joined(self._parts.approx, infos, nearest(linearizer.following)) if infos else None

    def parameters(self) -> list[Tensor]:
        """The parameters in execution order, aligned with the parts of a `BlockVector`, without their graph."""
        if self._views is None:
            self._views = [view for layer in self._parts.linearizer.layers for view in layer.views()]
        return self._views

    def backward(
        self, batch: Linearization | Accumulated, bound: BoundLoss | BoundJoint, *, retain: bool = False
    ) -> None:
        """Mean of J^T (d nll / dz), or this process's share of it."""
        assert self.grad is not None
        batch.gradient(bound.residuals(batch.outputs()), self.grad, retain=retain)

    def gradient(self, eta: float) -> BlockVector:
        """Grad h, that mean + eta theta; the mean alone, over all processes, is what `fill_grad` leaves."""
        assert self.grad is not None
        self._parts.ranks.sum_into("gradient", self.grad.flat)
        if self.fill_grad:
            self._fill(self.grad)
        torch._foreach_add_(self.grad.parts, self.parameters(), alpha=eta)
        return self.grad

    def _fill(self, grad: BlockVector) -> None:
        """Copy it to where torch's tools look for gradients."""
        own: dict[nn.Parameter, Tensor] = {p: torch.zeros_like(p) for p in self._parts.linearizer.parameters}
        for layer, matrix in zip(self._parts.linearizer.layers, grad.blocks, strict=True):
            for view, part in zip(layer.view(own.__getitem__), layer.split(matrix), strict=True):
                view.copy_(part)
        for parameter, value in own.items():
            parameter.grad = value

    def inverses(
        self, preconditioner: Preconditioner, k: int, *, again: bool
    ) -> tuple[Sequence[tuple[Tensor, Inverse]], list[Notice], bool]:
        """The inverses to compare in this step, with their gammas: new ones, or the one in use."""
        damping = self._parts.damping
        gammas, pi = damping.candidates(k), damping.config.pi
        found, notices = preconditioner.refresh(gammas, pi=pi) if again else preconditioner.candidates(k, gammas, pi=pi)
        return found or [(damping.gamma, preconditioner.in_use)], notices, bool(found)

    def propose(self, preconditioner: Preconditioner, inverses: list[Inverse], grad: BlockVector) -> list[BlockVector]:
        """Delta = -F-hat^-1 grad for each inverse."""
        self._proposals += [self._vector() for _ in inverses[len(self._proposals) :]]
        proposals = self._proposals[: len(inverses)]
        for inverse, proposal in zip(inverses, proposals, strict=True):
            self.units.solve(partial(preconditioner.solve_into, inverse), grad, proposal)
            proposal.flat.neg_()
        return proposals

    def local(self, at: At, grad: BlockVector) -> LocalModel:
        """The quadratic model on the mini-batch's first cases."""
        momentum, whole, batch = self._parts.momentum, at.whole.cases, at.batch
        cases = momentum.cases(whole, at.positions)
        n = batch.model_cases(at.whole.first(cases))
        own = self.parameters() if momentum.config.slope == "model" and batch.cut and cases < whole else None
        lam = self._parts.damping.lam
        return LocalModel(batch, at.curved, grad, lam, at.eta, n, own, self._parts.ranks, self.units)

    def planes(self, local: LocalModel, proposals: list[BlockVector], *, moving: bool) -> tuple[Tensor, Tensor]:
        """M and b on (Delta, delta_prev) for each candidate, or on Delta alone where there is no step before."""
        assert self.delta is not None
        return local.planes([*proposals, self.delta] if moving else proposals, last=moving)

    def copy_of_delta(self) -> BlockVector:
        """The previous step beside itself: what is made of it may turn out not to be finite."""
        assert self.delta is not None
        self.spare = self.spare or [self._vector() for _ in range(4)]
        self.spare[0].flat.copy_(self.delta.flat)
        return self.spare[0]

    def _vector(self) -> BlockVector:
        return BlockVector.zeros(self._parts.linearizer.layers)
