"""The dense matrices of some adjacent layers, and how far each approximation of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kfacore.errors import ConfigError, KfacError
from kfacore.lab.diagnostics.cumulants import CumulantReport, cumulant_report
from kfacore.lab.diagnostics.dense import Difference, FactorPairs, compare, exact_fisher, inverse_of
from kfacore.lab.diagnostics.quality import inverses
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples
from kfacore.schema.slots import PiRule

__all__ = ["DenseReport", "dense_report"]


@dataclass
class DenseReport:
    """Matrices of some consecutive layers and their errors.

    Attributes:
        layers: These layers.
        first: Number of the first of them in the model, from 1.
        gamma: Damping of the inverses.
        F: The exact Fisher.
        F_tilde: The Kronecker-factored approximation.
        F_tilde_damped: The same with factored Tikhonov damping.
        F_tilde_inverse: Its inverse.
        matrices: F-hat by approximation, damped.
        inverses: F-hat^-1 by approximation, damped.
        errors: Relative errors by what is compared, see `dense_report`.
        refused: Why a comparison could not be made.
        cumulants: Equations 3 and 4; None if the statistics are not the exact expectation.
    """

    layers: list[Block]
    first: int
    gamma: float
    F: Tensor
    F_tilde: Tensor
    F_tilde_damped: Tensor
    F_tilde_inverse: Tensor
    matrices: dict[str, Tensor] = field(default_factory=dict)
    inverses: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Difference] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cumulants: CumulantReport | None = None

    @property
    def sizes(self) -> list[int]:
        """Parameters of each layer."""
        return [layer.size for layer in self.layers]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the matrices."""
        return {
            "first_layer": self.first,
            "layers": [layer.name for layer in self.layers],
            "parameters": sum(self.sizes),
            "gamma": self.gamma,
            "errors": {name: error.as_dict() for name, error in self.errors.items()},
            "refused": dict(self.refused),
            "cumulants": None if self.cumulants is None else self.cumulants.as_dict(),
        }


def dense_report(
    layers: Sequence[Block],
    samples: Sequence[LayerSamples],
    approximations: Mapping[str, Approximation],
    gamma: float,
    *,
    pi: PiRule = "layer",
    first: int = 1,
) -> DenseReport:
    """Matrices of some adjacent layers and all their errors.

    The errors' names: ``"F-tilde / F"``; for each approximation ``"NAME / F-tilde"``, ``"NAME^-1 / F-tilde^-1"`` and
    ``"NAME^-1 / F^-1"``, all damped, F by adding what factored Tikhonov damping adds to F-tilde; and
    ``"NAME^-1 / F-tilde^-1, undamped"``, left out where F-tilde has no inverse.

    Args:
        layers: The layers.
        samples: What they saw.
        approximations: By name; built for these layers alone.
        gamma: Damping.
        pi: Split gamma by traces.
        first: Number of the first of these layers in the model.

    Raises:
        KfacError: An approximation refused these layers.
    """
    pairs = FactorPairs.of(samples)
    F, F_tilde, damped = exact_fisher(samples), pairs.matrix(), pairs.damped(gamma, pi=pi).matrix()
    report = DenseReport(list(layers), first, gamma, F, F_tilde, damped, inverse_of(damped, "F-tilde"))
    sizes = report.sizes
    report.errors["F-tilde / F"] = compare(F_tilde, F, sizes)
    exact_inverse = inverse_of(F + damped - F_tilde, "the damped Fisher")
    report.errors["F-tilde^-1 / F^-1"] = compare(report.F_tilde_inverse, exact_inverse, sizes)
    undamped: Tensor | None = None
    try:
        undamped = inverse_of(F_tilde, "F-tilde without damping")
    except ConfigError as error:
        report.refused["undamped inverses"] = str(error)
    for name, approx in approximations.items():
        [(_, inverse)] = inverses(approx, layers, samples, [gamma], pi=pi)
        report.matrices[name], report.inverses[name] = inverse.dense(inverse=False), inverse.dense()
        report.errors[f"{name} / F-tilde"] = compare(report.matrices[name], damped, sizes)
        report.errors[f"{name}^-1 / F-tilde^-1"] = compare(report.inverses[name], report.F_tilde_inverse, sizes)
        report.errors[f"{name}^-1 / F^-1"] = compare(report.inverses[name], exact_inverse, sizes)
        if undamped is None:
            continue
        title = f"{name}^-1 / F-tilde^-1, undamped"
        try:
            [(_, free)] = inverses(approx, layers, samples, [0.0], pi=pi)
            report.errors[title] = compare(free.dense(), undamped, sizes)
        except KfacError as error:
            report.refused[title] = str(error)
    report.cumulants = cumulant_report(samples)
    return report
