r"""The block-diagonal approximation of the inverse Fisher (Martens & Grosse 2015, section 4.2).

Each layer's block of the Fisher is a Kronecker product, and the inverse acts on the layer's weight block V_i as

    U_i = Gd_i^-1 V_i Ad_i^-1.

With an exponent below 1 (``power``) the damped factors are tempered first, see `kfacore.curvature.tempering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac_plugins.approx import BlockDiagonalConfig
from kfacore.curvature.kronecker import DampedFactors, damp, ready
from kfacore.curvature.linalg import log_pi_of
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.plugin import PiRule
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moments

__all__ = ["BlockDiagonal"]


class BlockDiagonalInverse(Inverse):
    """F-hat = diag_i(Ad_i (x) Gd_i), any graph of layers."""

    def __init__(self, layers: Sequence[Block], factors: DampedFactors, notices: tuple[Notice, ...] = ()) -> None:
        self.layers = layers
        self.notices = notices
        self._factors = factors

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Gd^-1 V Ad^-1 a layer."""
        return [self._factors.solve(i, V) for i, V in enumerate(blocks)]

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """The last product of each layer lands where it is wanted."""
        for i, (V, target) in enumerate(zip(blocks, out, strict=True)):
            self._factors.solve(i, V, target)

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Gd V Ad a layer."""
        return [self._factors.multiply(i, V) for i, V in enumerate(blocks)]

    def state_dict(self) -> dict[str, Any]:
        """The damped factors."""
        return self._factors.state_dict()

    def _like(self) -> Tensor:
        return self._factors.A[0].inverse


class BlockDiagonalFactorisation(Factorisation):
    """A and G, shared by all candidates of gamma; each candidate is two Choleskys or eigenproblems a layer."""

    def __init__(self, layers: Sequence[Block], moments: Moments, power: float) -> None:
        self._layers, self._power = layers, power
        self._A, self._G = (ready(moments[kind], power) for kind in (InputFactor, OutputFactor))

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Of all blocks."""
        return log_pi_of(self._A, self._G)

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> BlockDiagonalInverse:
        """Damp, temper and invert."""
        found = damp(self._layers, self._A, self._G, gamma, pi=pi, power=self._power, keep_roots=False)
        return BlockDiagonalInverse(self._layers, found.factors, found.notices)


class BlockDiagonal(Approximation):
    """Block-diagonal Kronecker-factored Fisher."""

    Config = BlockDiagonalConfig
    config: BlockDiagonalConfig
    moments = (InputFactor, OutputFactor)
    damps_each = True
    divides = True

    def factorise(self, moments: Moments) -> BlockDiagonalFactorisation:
        """Symmetrise A and G where the inverse will keep them."""
        return BlockDiagonalFactorisation(moments.layers, moments, self.config.power)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> BlockDiagonalInverse:
        """From the damped factors."""
        return BlockDiagonalInverse(layers, DampedFactors.from_state(state))
