"""What a run would be made of, without training: layers, factors and memory (``kfac train --dry-run``)."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from kfacore.curvature.joined import Joined
from kfacore.curvature.places import averages
from kfacore.errors import NumericalError
from kfacore.lab.data.status import ReportsData
from kfacore.lab.training.batches import BatchSchedule
from kfacore.lab.training.init import load_parameters
from kfacore.lab.training.setup import build_model, build_optimizer, check_data, place, resolve_device
from kfacore.lab.training.trial import StepMemory, step_memory
from kfacore.network import find_layers
from kfacore.optim.explain import Explanation
from kfacore.optim.kfac import KFAC
from kfacore.roles import Split
from kfacore.roles.block import share_of

if TYPE_CHECKING:
    from pathlib import Path

    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry
    from kfacore.roles import Likelihood, Problem

__all__ = ["FactorInfo", "LayerRow", "ModelTable", "describe"]

logger = logging.getLogger("kfacore.lab.training")

_FEW = 16
"""Examples that the model is tried on."""

_SYMBOLS = {"InputFactor": "A", "OutputFactor": "G", "InputCross": "Ax", "OutputCross": "Gx"}
"""What the built-in moments are called in method.md; others go by the name of their class."""


@dataclass(frozen=True)
class FactorInfo:
    """One running average of one layer (or of a layer and the next).

    Attributes:
        symbol: What it is called, for example ``"A"``.
        shape: Its shape.
    """

    symbol: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table.

    Attributes:
        name: The module's name.
        d_in: Width of the homogeneous input, the bias's 1 included.
        d_out: Number of units.
        parameters: Number of parameters.
        factors: Its factors; empty for optimizers without an approximation.
    """

    name: str
    d_in: int
    d_out: int
    parameters: int
    factors: tuple[FactorInfo, ...]


@dataclass(frozen=True)
class ModelTable:
    """All layers and what they take in memory.

    Attributes:
        rows: The layers in the order of the model.
        bytes_per_number: Size of a number in the run's dtype.
        explanation: What K-FAC does with every parameter; None for other optimizers.
        step: Memory of the run's largest step; None for other optimizers, and where there is no data to try it on.
    """

    rows: tuple[LayerRow, ...]
    bytes_per_number: int
    explanation: Explanation | None = None
    step: StepMemory | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def factor_entries(self) -> int:
        """Number of entries of all factors."""
        return sum(factor.size for row in self.rows for factor in row.factors)

    def megabytes(self, entries: int) -> float:
        """Memory of so many numbers, in MB of 10^6 bytes."""
        return entries * self.bytes_per_number / 1e6


def describe(config: RunConfig, registry: Registry, init: Path | None = None) -> ModelTable:
    """Build the model and list its layers; refuse what the run would refuse, as far as nothing is fetched or trained.

    Args:
        config: The resolved configuration.
        registry: Where the components are.
        init: A file of parameters, which is checked against the model.

    Returns:
        The table. Data is read and checked if it is there; a problem whose files are missing, or are generated on first
        use, is described all the same.

    Raises:
        KfacError: The device, the problem, its data, the model, the optimizer or the parameters are not usable.
    """
    device = resolve_device(config.device)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    problem: Problem = registry.build("problem", config.problem)
    likelihood = registry.build("likelihood", config.likelihood)
    model = build_model(config, problem)
    data = problem.load() if _data_is_there(config.problem) else None
    if data is not None:
        check_data(model, likelihood, data)
    if init is not None:
        load_parameters(model, init)
    model = model.to(device=device, dtype=dtype)
    optimizer = build_optimizer(config, registry, model, likelihood)
    size = dtype.itemsize
    if config.approx is None:
        return ModelTable(tuple(_plain_rows(model)), size)
    if isinstance(optimizer, KFAC):
        blocks = list(optimizer.linearizer.layers)
    else:
        blocks = find_layers(model, registry.layers(), config.approx.max_dim)
    layers = [block.info for block in blocks]
    joined = Joined(registry.build("approx", config.approx), layers)
    factors = _factors(joined)
    rows = tuple(
        LayerRow(layer.name, layer.d_in, layer.d_out, layer.size, tuple(factors[index]))
        for index, layer in enumerate(layers)
    )
    if not isinstance(optimizer, KFAC):
        return ModelTable(rows, size)
    if data is None:
        return ModelTable(rows, size, optimizer.explain())
    few = place(Split(data.train.inputs[:_FEW], data.train.targets[:_FEW]), device, dtype)
    step = _step_memory(config, registry, model, likelihood, few, len(data.train))
    optimizer.linearizer(few.inputs)
    return ModelTable(rows, size, optimizer.explain(), step)


def _step_memory(
    config: RunConfig, registry: Registry, model: nn.Module, likelihood: Likelihood, few: Split, cases: int
) -> StepMemory | None:
    """What the largest mini-batch of the run takes; None where steps on so few examples are not finite."""
    batch = config.batch
    examples = BatchSchedule(batch.schedule, cases, batch.start, batch.target_step, batch.hold).size(config.steps)
    trial, share = _in_proportion(config, examples, batch.start, _positions(config, registry, model, likelihood, few))

    def build() -> KFAC:
        optimizer = build_optimizer(trial, registry, deepcopy(model), likelihood)
        assert isinstance(optimizer, KFAC)
        return optimizer

    try:
        with torch.random.fork_rng():
            return step_memory(build, few.inputs, few.targets, examples, share)
    except NumericalError as error:
        logger.warning("no memory of a step: %s", error)
        return None


def _positions(config: RunConfig, registry: Registry, model: nn.Module, likelihood: Likelihood, few: Split) -> int:
    """Positions of an example's outputs."""
    optimizer = build_optimizer(config, registry, deepcopy(model), likelihood)
    assert isinstance(optimizer, KFAC)
    with torch.random.fork_rng():
        z = optimizer.linearizer(few.inputs).outputs()
    return 1 if z[0].dim() == 2 else optimizer.loss.bind(z, few.targets).positions


def _in_proportion(config: RunConfig, examples: int, first: int, positions: int) -> tuple[RunConfig, float]:
    """The configuration for trials on few examples, with the run's shares of a mini-batch; and the smallest of them.

    The first mini-batch has to count examples where later ones count their positions: the larger share is that of the
    step that takes the most.
    """
    assert config.estimator is not None
    assert config.momentum is not None
    assert config.approx is not None
    taken = [(min(first, examples), 1), (examples, positions)]
    tau1, tau2 = (
        max(share_of(cases, tau, least, R) for cases, R in taken) / examples
        for tau, least in (
            (config.estimator.tau1, config.estimator.min_cases),
            (config.momentum.tau2, config.momentum.min_cases),
        )
    )
    further = config.momentum.iterations if examples >= config.momentum.iterations_from else 1
    parts = {
        "estimator": config.estimator.model_copy(update={"tau1": tau1, "min_cases": 1}),
        "momentum": config.momentum.model_copy(
            update={"tau2": tau2, "min_cases": 1, "iterations": further, "iterations_from": 1}
        ),
        "approx": config.approx.model_copy(update={"refresh": "inline"}),
    }
    return config.model_copy(update=parts), min(tau1, tau2)


def _data_is_there(problem: object) -> bool:
    """Whether loading it takes no more than reading it."""
    return not isinstance(problem, ReportsData) or problem.data_status().state not in ("missing", "generated")


def _factors(joined: Joined) -> list[list[FactorInfo]]:
    """The running averages by layer; those of a pair of layers stand with the first of the two."""
    found: list[list[FactorInfo]] = [[] for _ in joined.layers]
    for average in averages(joined):
        symbol = _SYMBOLS.get(average.kind.__name__, average.kind.__name__)
        name = f"{symbol}.{average.which}" if average.which else symbol
        found[average.block or 0].append(FactorInfo(name, average.shape))
    return found


def _plain_rows(model: nn.Module) -> list[LayerRow]:
    """Modules with parameters of their own, for optimizers that take any."""
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        weight = max(own.values(), key=torch.Tensor.numel)
        d_out, d_in = (int(weight.shape[0]), weight[0].numel()) if weight.dim() > 1 else (weight.numel(), 1)
        rows.append(LayerRow(name, d_in + ("bias" in own), d_out, sum(p.numel() for p in own.values()), ()))
    return rows
