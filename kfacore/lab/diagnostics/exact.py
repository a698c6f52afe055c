r"""The exact quadratic model of the objective around the parameters, in double precision, without any P x P matrix.

    h(theta + delta)  ~  h + g^T delta + 1/2 delta^T B delta,       B = F + (lambda + eta) I,

with F the exact Fisher on the given cases, F = (1/S) sum over rows of J^T F_R J (paper, sections 2.2 and 6.4). It is
the model that the optimizer steps on, `kfacore.optim.local.LocalModel`, of one mini-batch that holds all the cases.
F v is J v, F_R at the outputs, and J^T by reverse mode; the cost is that of about three gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.curvature.forest import nearest
from kfacore.errors import NumericalError
from kfacore.nest import map_nest
from kfacore.network import BlockVector, Linearizer
from kfacore.network.blocks import ModelBlock
from kfacore.network.jvp import tangents_of, within
from kfacore.optim.local import LocalModel
from kfacore.optim.loss import Loss
from kfacore.optim.objective import penalty
from kfacore.optim.statistics import seen
from kfacore.registry import get_registry
from kfacore.roles.block import Block
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.samples import LayerSamples, Samples

__all__ = ["Blocks", "ExactModel", "axpy", "dot", "norm"]

Blocks = list[Tensor]
"""A vector of parameter space as one matrix ([groups,] d_out, d_in) a block, in execution order."""


def dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> float:
    """u^T v."""
    return float(sum(float((a * b).sum()) for a, b in zip(u, v, strict=True)))


def norm(u: Sequence[Tensor]) -> float:
    """||u||."""
    return float(dot(u, u) ** 0.5)


def axpy(c: float, u: Sequence[Tensor], v: Sequence[Tensor]) -> Blocks:
    """The vector c u + v."""
    return [torch.add(b, a, alpha=c) for a, b in zip(u, v, strict=True)]


class ExactModel:
    """A model at fixed parameters on fixed cases, linearised once; the caller's model is copied and left alone.

    It is the function that `kfacore.KFAC` would see on a mini-batch of these cases: in the training modes that the
    model is in, with one draw of its random numbers, with the statistics of these cases where they are mixed.

    Args:
        model: Any module.
        likelihood: The likelihood of its outputs.
        inputs: A nest of tensors whose first dimension is the case; floating point is taken to double precision.
        targets: One target a case, or a position of a case.
        weight_decay: eta of the objective.
        lam: lambda, the damping of the quadratic model.
        valid: Which positions count; all if left out.
        max_dim: A side of a Kronecker product that is wider is diagonal (`approx.max_dim`).

    Attributes:
        layers: The blocks in execution order.
        following: Pairs of blocks that follow each other and could be coupled.
        pairs: Which of them are coupled where an approximation couples blocks, as in training.
        cases: Number of cases, n.
        lam: lambda.
        weight_decay: eta.
        objective: h at the parameters.

    Raises:
        UnsupportedModelError: The model cannot be linearised; the message names what it is.
        DataError: Inputs and targets do not fit.
        NumericalError: The objective is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        inputs: Any,
        targets: Tensor,
        *,
        weight_decay: float = 0.0,
        lam: float = 0.0,
        valid: Tensor | None = None,
        max_dim: int = 8192,
    ) -> None:
        self.likelihood = likelihood
        self.lam, self.weight_decay = float(lam), float(weight_decay)
        self._model = copy.deepcopy(model).double()
        self._inputs, self._targets = map_nest(_double, inputs), _double(targets)
        self._linearizer = Linearizer(self._model, layers=get_registry().layers(), max_dim=max_dim)
        self._batch = self._linearizer(self._inputs)
        self._bound = Loss(likelihood).bind(self._batch.outputs(), self._targets, valid)
        self._rules = self._linearizer.layers
        self.cases = self._batch.cases
        self.layers: list[Block] = [layer.info for layer in self._rules]
        self.following = list(self._linearizer.following or [])
        self.pairs = nearest(self.following)
        self.objective = self.objective_at(self.zeros())
        if not math.isfinite(self.objective):
            raise NumericalError("the objective is not finite at these parameters; nothing can be measured around them")

    def damped(self, lam: float) -> ExactModel:
        """The same model with another lambda."""
        twin = copy.copy(self)
        twin.lam = float(lam)
        return twin

    @property
    def model(self) -> nn.Module:
        """The copy in double precision; do not change it."""
        return self._model

    @property
    def inputs(self) -> Any:
        """The cases' inputs in double precision."""
        return self._inputs

    @property
    def targets(self) -> Tensor:
        """The cases' targets."""
        return self._targets

    @property
    def damping(self) -> float:
        """What B adds to F, lambda + eta."""
        return self.lam + self.weight_decay

    @property
    def parameters(self) -> int:
        """P."""
        return sum(layer.size for layer in self.layers)

    @property
    def plain(self) -> bool:
        """Whether it is the paper's setting: Linear layers called once on a row a case, and the mean of the likelihood.

        Then passes of the exact expectation are exact in every block, and matrices can be made of samples.
        """
        return self._batch.plain and self._bound.plain

    @property
    def rules(self) -> list[ModelBlock]:
        """The blocks with the modules that use them, for `kfacore.network.BlockVector`."""
        return self._rules

    @property
    def mixes(self) -> bool:
        """Whether the outputs of a case depend on other cases."""
        return self._linearizer.mixes

    @property
    def draws(self) -> bool:
        """Whether the model draws random numbers; they are the same in all that is measured here."""
        facts = self._linearizer.facts
        return facts is not None and bool(facts.draws)

    @property
    def passes(self) -> int:
        """Backward passes of `exact_samples`: one for each number of each position."""
        return self._bound.layout.rows * self._bound.layout.outputs

    def outputs(self) -> Tensor:
        """Natural parameters of all cases, z, (n, ..., o)."""
        return torch.cat(self._batch.outputs())

    def zeros(self) -> Blocks:
        """The zero vector."""
        return self._vector().blocks

    def theta(self) -> Blocks:
        """The parameters as blocks, [W b] of a Linear layer."""
        vector = self._vector()
        torch._foreach_copy_(vector.parts, self._views())
        return vector.blocks

    def gradient(self) -> Blocks:
        """The gradient g of h: J^T (d loss / dz), plus eta theta."""
        vector = self._vector()
        self._batch.gradient(self._bound.residuals(self._batch.outputs()), vector, retain=True)
        torch._foreach_add_(vector.parts, self._views(), alpha=self.weight_decay)
        return vector.blocks

    def local(self, gradient: Sequence[Tensor] | None = None) -> LocalModel:
        """The optimizer's quadratic model, B with a gradient, that of h if none is given."""
        g = self._vector(self.gradient() if gradient is None else gradient)
        lam = torch.tensor(self.lam, dtype=torch.float64, device=g.flat.device)
        return LocalModel(self._batch, self._bound, g, lam, self.weight_decay, self.cases)

    def fisher(self, v: Sequence[Tensor]) -> Blocks:
        """F v."""
        local = self.local(v)  # the gradient has no part in it
        return local.fisher_product(local.push([local.grad])[0], self._vector()).blocks

    def curvature(self, v: Sequence[Tensor]) -> Blocks:
        """B v = F v + (lambda + eta) v."""
        return axpy(self.damping, v, self.fisher(v))

    def quadratic_form(self, v: Sequence[Tensor]) -> float:
        """v^T B v, by J v alone: cheaper than `curvature`, and never negative."""
        local = self.local(v)
        return float(local.planes([local.grad], last=False)[0][0, 0, 0])

    @torch.no_grad()
    def objective_at(self, delta: Sequence[Tensor]) -> float:
        """h(theta + delta) on these cases, with the same random numbers; infinite or NaN where the step overflows."""
        parameters = self._linearizer.named
        steps = tangents_of(self._rules, self._linearizer.names, delta)
        moved = {name: parameters[name].detach() + step for name, step in steps.items()}
        loss, _ = self._bound.value([within(self._model, moved, self._batch.again)])
        return float(loss + penalty(list(moved.values()), self.weight_decay))

    def samples(self, estimator: Estimator, generator: torch.Generator, draws: int = 1) -> Samples:
        """What each block sees of an estimator's passes, on all cases.

        Args:
            estimator: What is sent back.
            generator: Source of every draw.
            draws: Independent repetitions that the squares are the mean of.

        Returns:
            One entry a block, None for one that these cases did not use.
        """
        z = self._batch.statistics_outputs()
        vectors = [self._bound.statistics(z, estimator, generator) for _ in range(draws)]
        together = vectors[0] if draws == 1 else torch.cat(vectors) / math.sqrt(draws)
        ((_, samples),) = seen(self._batch, self._bound, together, generator)
        return samples

    def exact_samples(self) -> list[LayerSamples | None]:
        """Samples whose second moments over passes are the exact expectation over the model's own targets.

        Except where sums over cases are squared: raw parameters, and below what mixes cases, get random signs.
        """
        return list(self.samples(get_registry().build("estimator", "exact"), torch.Generator().manual_seed(0)))

    def monte_carlo_samples(self, generator: torch.Generator, passes: int = 1) -> list[LayerSamples | None]:
        """Samples with targets drawn from the model, the mean over ``passes`` independent draws a case."""
        return list(self.samples(get_registry().build("estimator", "monte-carlo"), generator, passes))

    def empirical_samples(self) -> list[LayerSamples | None]:
        """Samples with the training targets: another metric, the empirical Fisher (paper, end of section 5)."""
        return list(self.samples(get_registry().build("estimator", "empirical"), torch.Generator().manual_seed(0)))

    def fisher_matrix(self, first: int, last: int) -> Tensor:
        """F of the blocks first..last-1 from one product a parameter: right for any model, whatever its blocks are.

        Returns:
            (P, P) of these blocks, in the order of `Inverse.dense`.
        """
        columns = []
        unit = self.zeros()
        for index in range(first, last):
            *groups, d_out, d_in = self.layers[index].shape
            for position in range(self.layers[index].size):
                e = torch.zeros(self.layers[index].size, dtype=torch.float64, device=unit[index].device)
                e[position] = 1.0
                unit[index].copy_(e.reshape(*groups, d_in, d_out).mT)
                found = self.fisher(unit)[first:last]
                columns.append(torch.cat([block.mT.reshape(-1) for block in found]))
            unit[index].zero_()
        return torch.stack(columns, dim=1)

    def _views(self) -> list[Tensor]:
        return [view for layer in self._rules for view in layer.views()]

    def _vector(self, blocks: Sequence[Tensor] | None = None) -> BlockVector:
        vector = BlockVector.zeros(self._rules)
        return vector if blocks is None else vector.copy_blocks(blocks)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
