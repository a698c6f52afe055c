r"""The exact quadratic model of the objective around the parameters, in double precision, without any P x P matrix.

    h(theta + delta)  ~  h + g^T delta + 1/2 delta^T B delta,       B = F + (lambda + eta) I,

with F the exact Fisher on the given cases, F = mean over cases of J^T F_R J (paper, sections 2.2 and 6.4). F v is J v
by forward mode, F_R at the outputs, and J^T by reverse mode; the cost is that of about three gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import ConfigError, DataError, NumericalError
from kfacore.nest import cases_of, map_nest, slice_cases
from kfacore.network import Linearization, Linearizer
from kfacore.optim.loss import Loss
from kfacore.roles.block import Block
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.samples import LayerSamples

__all__ = ["Blocks", "ExactModel", "axpy", "dot", "norm"]

Blocks = list[Tensor]
"""A vector of parameter space as one matrix (d_out, d_in) a layer, in execution order."""

OutputVectors = Callable[[Tensor, Tensor], Tensor]
"""(z, y) of some cases -> (k, n, o), what is sent back through them."""


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

    Args:
        model: Any module whose trainable parameters lie in supported layers.
        likelihood: The likelihood of its outputs.
        inputs: A nest of tensors whose first dimension is the case; floating point is taken to double precision.
        targets: One target a case.
        weight_decay: eta of the objective.
        lam: lambda, the damping of the quadratic model.
        chunk: Cases in one forward pass; bounds memory, does not change results.

    Attributes:
        layers: The layers in execution order.
        cases: Number of cases, n.
        lam: lambda.
        weight_decay: eta.
        objective: h at the parameters.

    Raises:
        UnsupportedModelError: A module cannot be linearised; the message names it.
        ConfigError: The likelihood has options that these measurements do not know.
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
        chunk: int = 1000,
    ) -> None:
        self.likelihood = likelihood
        self.lam, self.weight_decay = float(lam), float(weight_decay)
        self._model = copy.deepcopy(model).double()
        self._inputs = map_nest(_double, inputs)
        self._targets = _double(targets)
        self.cases = cases_of(self._inputs)
        if len(targets) != self.cases:
            raise DataError(f"targets: found {len(targets)} targets for {self.cases} cases of inputs")
        linearizer = Linearizer(self._model, unsupported="error")
        self._bounds = [(a, min(a + chunk, self.cases)) for a in range(0, self.cases, chunk)]
        self._parts: list[Linearization] = [linearizer(slice_cases(self._inputs, a, b)) for a, b in self._bounds]
        self._require_plain()
        self._rules = linearizer.layers
        self._names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        self.layers: list[Block] = [layer.info for layer in linearizer.layers]
        self.objective = self.objective_at(self.zeros())
        if not math.isfinite(self.objective):
            raise NumericalError("the objective is not finite at these parameters; nothing can be measured around them")

    def _require_plain(self) -> None:
        """Means over cases of the likelihood itself are what is measured here."""
        outputs = [z for part in self._parts for z in part.outputs()]
        if not Loss(self.likelihood).bind(outputs, self._targets).plain:
            raise ConfigError(
                f"likelihood '{self.likelihood.config.kind}': these measurements know the mean of the likelihood over "
                "cases; leave out its options (weight, scale, ignore_index, label_smoothing, per, mean_outputs)"
            )

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

    def outputs(self) -> Tensor:
        """Natural parameters of all cases, z, (n, o)."""
        return torch.cat([z for part in self._parts for z in part.outputs()])

    def zeros(self) -> Blocks:
        """The zero vector."""
        like = self._rules[0].parameters[0]
        return [torch.zeros(layer.shape, dtype=torch.float64, device=like.device) for layer in self.layers]

    def theta(self) -> Blocks:
        """The parameters as blocks [W b]."""
        blocks = self.zeros()
        for layer, block in zip(self._rules, blocks, strict=True):
            for view, parameter in zip(layer.split(block), layer.parameters, strict=True):
                view.copy_(parameter.detach())
        return blocks

    def gradient(self) -> Blocks:
        """The gradient g of h: mean over cases of J^T (d nll / dz), plus eta theta."""
        blocks = self.zeros()
        for part, (a, b) in zip(self._parts, self._bounds, strict=True):
            z = part.statistics_outputs()
            v = self.likelihood.residual(z, self._targets[a:b]) / self.cases
            _add_transposed_jacobian(part, v, blocks)
        return axpy(self.weight_decay, self.theta(), blocks)

    def fisher(self, v: Sequence[Tensor]) -> Blocks:
        """F v."""
        blocks = self.zeros()
        for part in self._parts:
            z = part.statistics_outputs()
            u = self.likelihood.fisher_product(z, part.jvp([v])[0]) / self.cases
            _add_transposed_jacobian(part, u, blocks)
        return blocks

    def curvature(self, v: Sequence[Tensor]) -> Blocks:
        """B v = F v + (lambda + eta) v."""
        return axpy(self.damping, v, self.fisher(v))

    def quadratic_form(self, v: Sequence[Tensor]) -> float:
        """v^T B v, by J v alone: cheaper than `curvature`, and never negative."""
        total = 0.0
        for part in self._parts:
            Jv = part.jvp([v])[0]
            total += float((Jv * self.likelihood.fisher_product(part.statistics_outputs(), Jv)).sum())
        return total / self.cases + self.damping * dot(v, v)

    @torch.no_grad()
    def objective_at(self, delta: Sequence[Tensor]) -> float:
        """h(theta + delta) on these cases; infinite or NaN where the step overflows."""
        moved = {}
        penalty = 0.0
        for layer, block in zip(self._rules, delta, strict=True):
            for parameter, view in zip(layer.parameters, layer.split(block), strict=True):
                value = parameter.detach() + view
                moved[self._names[id(parameter)]] = value
                penalty += float(value.square().sum())
        loss = 0.0
        for a, b in self._bounds:
            z = torch.func.functional_call(self._model, moved, (slice_cases(self._inputs, a, b),))
            loss += float(self.likelihood.nll(z, self._targets[a:b]).sum())
        return loss / self.cases + 0.5 * self.weight_decay * penalty

    def samples(self, vectors: OutputVectors) -> list[LayerSamples]:
        """What each layer sees when ``vectors(z, y)`` are sent back: abar (n, d_in) and g (k, n, d_out)."""
        parts = []
        for part, (a, b) in zip(self._parts, self._bounds, strict=True):
            found = part.backpropagate(vectors(part.statistics_outputs(), self._targets[a:b]))
            parts.append([sample for sample in found if sample is not None])
        return [
            LayerSamples(
                torch.cat([part[i].inputs for part in parts]), torch.cat([part[i].gradients for part in parts], dim=1)
            )
            for i in range(len(self.layers))
        ]

    def exact_samples(self) -> list[LayerSamples]:
        """Samples whose second moments over passes are the exact expectation over the model's own targets."""
        return self.samples(lambda z, _: self.likelihood.fisher_sqrt(z))

    def monte_carlo_samples(self, generator: torch.Generator, passes: int = 1) -> list[LayerSamples]:
        """Samples with targets drawn from the model, the mean over ``passes`` independent draws a case."""

        def drawn(z: Tensor, _: Tensor) -> Tensor:
            residuals = [self.likelihood.residual(z, self.likelihood.sample(z, generator)) for _ in range(passes)]
            return torch.stack(residuals) / math.sqrt(passes)

        return self.samples(drawn)

    def empirical_samples(self) -> list[LayerSamples]:
        """Samples with the training targets: another metric, the empirical Fisher (paper, end of section 5)."""
        return self.samples(lambda z, y: self.likelihood.residual(z, y).unsqueeze(0))


def _add_transposed_jacobian(part: Linearization, v: Tensor, blocks: Blocks) -> None:
    """Add J^T v to the blocks; keeps the graph, because the model is linearised once and used many times."""
    for block, sample in zip(blocks, part.backpropagate(v.unsqueeze(0)), strict=True):
        if sample is not None:
            block.addmm_(sample.gradients[0].T, sample.inputs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
