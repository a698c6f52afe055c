r"""The diagonal of the Fisher: every weight on its own (Becker & LeCun 1988; the baseline of every other curvature).

With abar and g of one case, the diagonal entry of weight (a, b) of a layer is a second moment over cases,

    D_ab = E[(g_a abar_b)^2] = E[g_a^2 abar_b^2],

so one product of squares a mini-batch gives it exactly: no Kronecker approximation is made, but all couplings are
dropped. Where a case has several rows (positions, uses) its gradient is their sum M = sum_r g_r abar_r^T, and
D = E[M^2]; every kind of block is served. The damping is plain Tikhonov damping, F-hat = diag(D) + gamma^2 I: there are
no two factors to split gamma between, and gamma^2 is what the factored damping of method.md, section 3, adds to a block
in all (pi cancels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_plugins.approx import DiagonalConfig
from kfacore.curvature.cases import case_chunks
from kfacore.curvature.moments import frequencies
from kfacore.errors import NumericalError
from kfacore.plugin import PiRule
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment, Moments, blend
from kfacore.roles.samples import LayerSamples, Samples

__all__ = ["Diagonal", "DiagonalMoment"]


class DiagonalMoment(Moment):
    """D_i = E[M_i^2] of the cases' gradients M_i, entry by entry, in the block's shape; summed over passes."""

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Every kind has a diagonal."""
        return True

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """(d_out, d_in) a block, with the groups in front if there are several."""
        return [layer.shape for layer in layers]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """(g^2)^T (abar^2) where a case has one row: passes share their inputs, so their squares are summed first."""
        for block, value, s, b, a in zip(self.layers, values, samples, beta, alpha, strict=True):
            if s is None:
                continue
            if block.kind == "diagonal":
                blend(value, s.gradients.square().sum((0, 1)).reshape(block.shape), b, a)
            elif s.positions == 1 and block.plain:
                value.addmm_(s.gradients.square().sum(0).T, s.inputs.square(), beta=b, alpha=a)
            elif s.positions is None and block.kind == "kron":
                blend(value, _expected(block, s), b, a)
            else:
                for k, rows in enumerate(case_chunks(block, s)):
                    blend(value, rows.square().sum((0, 1)), b if k == 0 else 1.0, a)


def _expected(block: Block, s: LayerSamples) -> Tensor:
    """Rows that do not belong to cases: the product of the factors' diagonals, times S."""
    g = s.gradients.square().sum((0, 1))  # ([groups,] d_out)
    token = not s.inputs.is_floating_point()
    abar = frequencies(s.inputs, block.d_in, s.gradients) if token else s.inputs.square().sum(0)  # ([groups,] d_in)
    return g.unsqueeze(-1) * (abar / s.rows).unsqueeze(-2)


class DiagonalInverse(Inverse):
    """F-hat = diag(D) + gamma^2 I, any graph of layers.

    Args:
        layers: The layers.
        curvature: D + gamma^2, (d_out, d_in) a layer.
    """

    def __init__(self, layers: Sequence[Block], curvature: Sequence[Tensor]) -> None:
        self.layers = layers
        self._curvature = list(curvature)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """V / (D + gamma^2), entry by entry."""
        return [V / c for V, c in zip(blocks, self._curvature, strict=True)]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """V (D + gamma^2), entry by entry."""
        return [V * c for V, c in zip(blocks, self._curvature, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The damped diagonal."""
        return {"curvature": list(self._curvature)}

    def _like(self) -> Tensor:
        return self._curvature[0]


class DiagonalFactorisation(Factorisation):
    """D, shared by all candidates of gamma; each candidate is one addition."""

    def __init__(self, layers: Sequence[Block], diagonal: Sequence[Tensor]) -> None:
        self._layers, self._diagonal = layers, diagonal

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> DiagonalInverse:
        """D + gamma^2; pi has nothing to split.

        Raises:
            NumericalError: A layer's diagonal is not finite, or 0 somewhere without damping; names the layer.
        """
        curvature = [d + gamma.square().to(d.dtype) for d in self._diagonal]
        usable = torch.stack([torch.isfinite(c).all() & (c > 0).all() for c in curvature]).tolist()  # one wait
        for layer, d, good in zip(self._layers, self._diagonal, usable, strict=True):
            if good:
                continue
            if bool(torch.isfinite(d).all()):
                raise NumericalError(
                    f"{layer.name}: the diagonal of the Fisher is 0 somewhere and gamma = {float(gamma):g} adds "
                    "nothing to it; raise the damping (damping.lambda0, or gamma_min)"
                )
            raise NumericalError(
                f"{layer.name}: the diagonal of the Fisher has NaN or infinite entries; the forward or backward pass "
                "overflowed. Check the data and the initialisation, or start with a larger damping"
            )
        return DiagonalInverse(self._layers, curvature)

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Nothing of no block: there is no pi."""
        nothing = self._diagonal[0].new_zeros(())
        return nothing, nothing


class Diagonal(Approximation):
    """Diagonal of the Fisher from the second moments of each case's gradient."""

    Config = DiagonalConfig
    config: DiagonalConfig
    moments = (DiagonalMoment,)
    divides = True

    def serves(self, block: Block) -> bool:
        """Every block."""
        return True

    def factorise(self, moments: Moments) -> DiagonalFactorisation:
        """Nothing to prepare."""
        return DiagonalFactorisation(moments.layers, moments[DiagonalMoment])

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> DiagonalInverse:
        """From the damped diagonal."""
        return DiagonalInverse(layers, state["curvature"])
