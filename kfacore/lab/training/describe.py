"""What a run would be made of, without training: layers, factors and memory (``kfac train --dry-run``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from kfacore.lab.data.status import ReportsData
from kfacore.lab.training.setup import build_model, build_optimizer, check_data, resolve_device
from kfacore.network import find_layers
from kfacore.roles.block import Block

if TYPE_CHECKING:
    from pathlib import Path

    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry
    from kfacore.roles import Approximation, Problem

__all__ = ["FactorInfo", "LayerRow", "ModelTable", "describe"]

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
    """

    rows: tuple[LayerRow, ...]
    bytes_per_number: int

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
    resolve_device(config.device)
    problem: Problem = registry.build("problem", config.problem)
    likelihood = registry.build("likelihood", config.likelihood)
    model = build_model(config, problem)
    if _data_is_there(config.problem):
        check_data(model, likelihood, problem.load())
    build_optimizer(config, registry, model, likelihood)
    if init is not None:
        from kfacore.lab.training.init import load_parameters

        load_parameters(model, init)
    size = 8 if config.dtype == "float64" else 4
    if config.approx is None:
        return ModelTable(tuple(_plain_rows(model)), size)
    approx = registry.build("approx", config.approx)
    layers = [layer.info for layer in find_layers(model, registry.layers())]
    approx.check_layers(layers)
    factors = _factors(approx, layers)
    rows = [
        LayerRow(layer.name, layer.d_in, layer.d_out, layer.size, tuple(factors[index]))
        for index, layer in enumerate(layers)
    ]
    return ModelTable(tuple(rows), size)


def _data_is_there(problem: object) -> bool:
    """Whether loading it takes no more than reading it."""
    return not isinstance(problem, ReportsData) or problem.data_status().state not in ("missing", "generated")


def _factors(approx: Approximation, layers: Sequence[Block]) -> list[list[FactorInfo]]:
    """The moments of an approximation by layer; those of a pair of layers stand with the first of the two."""
    found: list[list[FactorInfo]] = [[] for _ in layers]
    nothing = torch.empty(0, device="meta")  # shapes without memory
    for moment in approx.moments:
        symbol = _SYMBOLS.get(moment.__name__, moment.__name__)
        for index, value in enumerate(moment(layers, nothing).values):
            round_, layer = divmod(index, len(layers))  # the first tensor of every layer, then the second of every one
            found[layer].append(FactorInfo(f"{symbol}.{round_}" if round_ else symbol, tuple(value.shape)))
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
