"""The dense matrices of some adjacent layers, and how far each approximation of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kfacore.curvature.faults import named
from kfacore.errors import ConfigError, KfacError
from kfacore.lab.diagnostics.cumulants import CumulantReport, cumulant_report
from kfacore.lab.diagnostics.dense import Difference, FactorPairs, compare, exact_fisher, inverse_of, unshared
from kfacore.lab.diagnostics.quality import inverses
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples, Samples
from kfacore.schema.slots import PiRule

__all__ = ["DenseReport", "Tilde", "dense_report"]


@dataclass(frozen=True)
class Tilde:
    """The Kronecker-factored approximation of all blocks of the Fisher.

    Attributes:
        matrix: F-tilde.
        damped: With factored Tikhonov damping.
        inverse: The inverse of that.
    """

    matrix: Tensor
    damped: Tensor
    inverse: Tensor


@dataclass
class DenseReport:
    """Matrices of some consecutive layers and their errors.

    Attributes:
        layers: These layers.
        first: Number of the first of them in the model, from 1.
        gamma: Damping of the inverses.
        F: The exact Fisher.
        tilde: F-tilde and what is made of it; None where it is not defined, see `refused`.
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
    tilde: Tilde | None
    matrices: dict[str, Tensor] = field(default_factory=dict)
    inverses: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Difference] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cumulants: CumulantReport | None = None

    @property
    def F_tilde(self) -> Tensor:  # noqa: N802  # the paper's symbol
        """The Kronecker-factored approximation."""
        return self._tilde.matrix

    @property
    def F_tilde_damped(self) -> Tensor:  # noqa: N802
        """The same with factored Tikhonov damping."""
        return self._tilde.damped

    @property
    def F_tilde_inverse(self) -> Tensor:  # noqa: N802
        """Its inverse."""
        return self._tilde.inverse

    @property
    def _tilde(self) -> Tilde:
        if self.tilde is None:
            raise ConfigError(f"F-tilde is not defined for these layers: {self.refused['F-tilde']}")
        return self.tilde

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
    samples: Samples,
    approximations: Mapping[str, Approximation],
    gamma: float,
    *,
    pi: PiRule = "layer",
    first: int = 1,
    pairs: Sequence[tuple[int, int]] | None = None,
    fisher: Tensor | None = None,
    damping: float = 0.0,
) -> DenseReport:
    """Matrices of some adjacent layers and all their errors.

    The errors' names: ``"F-tilde / F"``; for each approximation ``"NAME / F-tilde"``, ``"NAME^-1 / F-tilde^-1"`` and
    ``"NAME^-1 / F^-1"``, all damped, F by adding what factored Tikhonov damping adds to F-tilde; and
    ``"NAME^-1 / F-tilde^-1, undamped"``, left out where F-tilde has no inverse. F-tilde is defined for blocks that are
    products of two whole factors and share their rows. For others there is ``"NAME^-1 / B^-1"`` alone, with the
    quadratic model's B = F + (lambda + eta) I.

    Args:
        layers: The layers.
        samples: What they saw.
        approximations: By name; built for these layers alone.
        gamma: Damping.
        pi: Split gamma by traces.
        first: Number of the first of these layers in the model.
        pairs: Which of these layers are coupled, a forest; each and the next if left out.
        fisher: The exact Fisher of these layers, if it cannot be made of the samples.
        damping: lambda + eta.

    Raises:
        ConfigError: A matrix has no inverse.
    """
    reasons = unshared(layers, samples)
    seen = [s for s in samples if s is not None]
    F = exact_fisher(seen) if fisher is None else fisher
    report = DenseReport(list(layers), first, gamma, F, None)
    if reasons:
        report.refused["F-tilde"] = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    truths = _truths(report, damping) if reasons else _truths_with_tilde(report, seen, gamma, pi)
    for name, approx in approximations.items():

        def solved(
            strength: float, approx: Approximation = approx, *, matrix: bool = False
        ) -> tuple[Tensor, Tensor | None]:
            """F-hat^-1, and F-hat if it is wanted."""
            [(_, inverse)] = inverses(approx, layers, samples, [strength], pi=pi, pairs=pairs)
            with named(approx, layers, "dense"):
                return inverse.dense(), inverse.dense(inverse=False) if matrix else None

        try:
            _compare(report, name, truths, solved)
        except KfacError as error:
            report.refused[name] = str(error)
    if report.tilde is not None and all(s.positions == 1 and s.total is None and s.count is None for s in seen):
        report.cumulants = cumulant_report(seen)
    elif report.tilde is not None:
        report.refused["cumulants"] = f"{layers[0].name} has several rows an example; they are of one row"
    return report


@dataclass(frozen=True)
class _Truths:
    """What approximations are compared with.

    Attributes:
        exact: The damped exact Fisher's inverse.
        name: How it is called.
        undamped: F-tilde^-1 without damping, where it exists.
    """

    exact: Tensor
    name: str
    undamped: Tensor | None = None


def _truths(report: DenseReport, damping: float) -> _Truths:
    """Where F-tilde is not defined."""
    B = report.F + damping * torch.eye(len(report.F), dtype=report.F.dtype, device=report.F.device)
    return _Truths(inverse_of(B, "the damped Fisher"), "B^-1")


def _truths_with_tilde(report: DenseReport, seen: Sequence[LayerSamples], gamma: float, pi: PiRule) -> _Truths:
    factors, F, sizes = FactorPairs.of(seen), report.F, report.sizes
    F_tilde, damped = factors.matrix(), factors.damped(gamma, pi=pi).matrix()
    tilde = report.tilde = Tilde(F_tilde, damped, inverse_of(damped, "F-tilde"))
    report.errors["F-tilde / F"] = compare(F_tilde, F, sizes)
    exact = inverse_of(F + damped - F_tilde, "the damped Fisher")
    report.errors["F-tilde^-1 / F^-1"] = compare(tilde.inverse, exact, sizes)
    try:
        return _Truths(exact, "F^-1", inverse_of(F_tilde, "F-tilde without damping"))
    except ConfigError as error:
        report.refused["undamped inverses"] = str(error)
        return _Truths(exact, "F^-1")


class _Solved(Protocol):
    def __call__(self, strength: float, *, matrix: bool = ...) -> tuple[Tensor, Tensor | None]: ...


def _compare(report: DenseReport, name: str, truths: _Truths, solved: _Solved) -> None:
    """All errors of one approximation."""
    sizes, tilde = report.sizes, report.tilde
    inverse, matrix = solved(report.gamma, matrix=True)
    assert matrix is not None
    report.matrices[name], report.inverses[name] = matrix, inverse
    if tilde is not None:
        report.errors[f"{name} / F-tilde"] = compare(matrix, tilde.damped, sizes)
        report.errors[f"{name}^-1 / F-tilde^-1"] = compare(inverse, tilde.inverse, sizes)
    report.errors[f"{name}^-1 / {truths.name}"] = compare(inverse, truths.exact, sizes)
    if truths.undamped is None:
        return
    title = f"{name}^-1 / F-tilde^-1, undamped"
    try:
        report.errors[title] = compare(solved(0.0)[0], truths.undamped, sizes)
    except KfacError as error:
        report.refused[title] = str(error)
