"""Approximations of the Fisher: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import ApproxConfig, Component
from kfacore.schema.slots import Fraction

__all__ = ["COMPONENTS", "BlockDiagonalConfig", "BlockTridiagonalConfig", "DiagonalConfig", "ExactConfig"]


class KroneckerConfig(ApproxConfig):
    """Options of approximations by Kronecker factors."""

    power: Fraction = 1.0
    """Exponent p: an eigenvalue f of a damped block counts as gamma^2 (f / gamma^2)^p; 1 is the Fisher as it is."""


class BlockDiagonalConfig(KroneckerConfig):
    """Options of the block-diagonal approximation."""

    kind: Literal["blockdiag"] = "blockdiag"
    """Name of the implementation."""


class BlockTridiagonalConfig(KroneckerConfig):
    """Options of the block-tridiagonal approximation."""

    kind: Literal["tridiag"] = "tridiag"
    """Name of the implementation."""

    tolerance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Keep canonical correlations of adjacent layers with r^2 above this: 0 is exact, 1 is block-diagonal."""


class DiagonalConfig(ApproxConfig):
    """Options of the diagonal of the Fisher."""

    kind: Literal["diagonal"] = "diagonal"
    """Name of the implementation."""


class ExactConfig(ApproxConfig):
    """Options of the dense Fisher of a small net."""

    kind: Literal["exact"] = "exact"
    """Name of the implementation."""

    max_parameters: Annotated[int, Field(ge=1)] = 4096
    """Largest net that is accepted; the matrix has as many rows (4096 are 134 MB a matrix in double precision)."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "approx",
        "blockdiag",
        BlockDiagonalConfig,
        "kfac_plugins.approx.blockdiag:BlockDiagonal",
        "Kronecker-factored blocks, layers independent (section 4.2); any graph of layers.",
    ),
    Component(
        "approx",
        "tridiag",
        BlockTridiagonalConfig,
        "kfac_plugins.approx.tridiag:BlockTridiagonal",
        "Inverse block-tridiagonal, adjacent layers coupled (section 4.3); a chain, or any forest of pairs.",
    ),
    Component(
        "approx",
        "diagonal",
        DiagonalConfig,
        "kfac_plugins.approx.diagonal:Diagonal",
        "Diagonal of the Fisher from per-example second moments; any graph of layers.",
    ),
    Component(
        "approx",
        "exact",
        ExactConfig,
        "kfac_plugins.approx.exact:Exact",
        "The dense Fisher of all parameters, nothing neglected; small nets only.",
    ),
)
