r"""The Fisher itself as one dense matrix, for small nets: what every approximation is an approximation of.

With the gradient of one case and pass over all L layers, columns of each block stacked (method, section 3),

    v = [vec(g_1 abar_0^T); ...; vec(g_L abar_{L-1}^T)],        F = E[v v^T],  (P, P),

(sums over its rows where a case has several)

where the expectation is over cases and over what the estimator sends back: with the estimator ``exact`` F is the exact
Fisher of the mini-batches averaged, with ``monte-carlo`` an unbiased estimate of it. No structure is assumed, so
nothing is neglected, at a price of P^2 memory and P^3 work a refresh. Damping: F-hat = F + gamma^2 I, the Tikhonov
damping that the factored one stands in for (paper, section 6.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_plugins.approx import ExactConfig
from kfacore.curvature.cases import case_gradients
from kfacore.curvature.linalg import factor_spd
from kfacore.curvature.spd import Spd
from kfacore.errors import NumericalError, UnsupportedModelError
from kfacore.plugin import PiRule
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse, Notice
from kfacore.roles.moment import Moment, Moments, Tally, divisor_of
from kfacore.roles.samples import LayerSamples, Samples

__all__ = ["DenseMoment", "Exact"]


class DenseMoment(Moment):
    """F = E[v v^T] over all blocks' parameters, one value of (P, P)."""

    symmetric = True

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Whatever has gradients of single cases."""
        return block.kind != "diagonal"

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """One matrix for the whole net."""
        total = sum(layer.size for layer in layers)
        return [(total, total)]

    def tallies(self, samples: Samples) -> list[Tally]:
        """S; blocks that saw nothing have a gradient of 0."""
        seen = [s.rows for s in samples if s is not None]
        return [Tally(divisor_of(samples), sum(seen) if seen else 0)]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """Rows v of every case, one pass after the other to bound the memory at n P numbers."""
        present = [s for s in samples if s is not None]
        if not present:
            return
        (value,), passes, cases = values, present[0].gradients.shape[0], present[0].cases
        for k in range(passes):
            parts = [self._rows(layer, s, k, cases) for layer, s in zip(self.layers, samples, strict=True)]
            rows = torch.cat(parts, dim=1)  # (n, P)
            value.addmm_(rows.T, rows, beta=beta[0] if k == 0 else 1.0, alpha=alpha[0])

    def _rows(self, layer: Block, s: LayerSamples | None, k: int, cases: int) -> Tensor:
        """One block's columns of v in pass k, (n, size); columns of each (d_out, d_in) block stacked."""
        if s is None:
            return self.values[0].new_zeros(cases, layer.size)
        head = None if s.head is None else replace(s.head, gradients=s.head.gradients[k : k + 1])
        found = case_gradients(layer, replace(s, gradients=s.gradients[k : k + 1], head=head))[0]
        return found.mT.flatten(1)


class ExactInverse(Inverse):
    """F + gamma^2 I and its inverse, both dense.

    Args:
        layers: The layers.
        matrix: The damped matrix with its inverse.
        notices: What needed more than the parameters' precision.
    """

    def __init__(self, layers: Sequence[Block], matrix: Spd, notices: Sequence[Notice] = ()) -> None:
        self.layers = layers
        self.notices = tuple(notices)
        self._matrix = matrix

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """(F + gamma^2 I)^-1 v."""
        return self._blocks(self._matrix.inverse @ _stack(blocks))

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """(F + gamma^2 I) v."""
        return self._blocks(self._matrix.times(_stack(blocks)))

    def state_dict(self) -> dict[str, Any]:
        """The matrix, what was added to its diagonal, and the inverse."""
        return {"base": self._matrix.base, "shift": self._matrix.shift, "inverse": self._matrix.inverse}

    def dense(self, *, inverse: bool = True) -> Tensor:
        """The matrix as it is kept."""
        if inverse:
            return self._matrix.inverse.clone()
        matrix = self._matrix.base.clone()
        matrix.diagonal().add_(self._matrix.shift)
        return matrix

    def _like(self) -> Tensor:
        return self._matrix.inverse

    def _blocks(self, column: Tensor) -> list[Tensor]:
        parts = torch.split(column.squeeze(1), [layer.size for layer in self.layers])
        shapes = [layer.shape for layer in self.layers]
        return [part.reshape(*g, i, o).mT for part, (*g, o, i) in zip(parts, shapes, strict=True)]


def _stack(blocks: Sequence[Tensor]) -> Tensor:
    """Columns of each block stacked, (P, 1)."""
    return torch.cat([block.mT.reshape(-1) for block in blocks]).unsqueeze(1)


class ExactFactorisation(Factorisation):
    """A symmetric copy of F, shared by all candidates of gamma; each candidate is one Cholesky of (P, P)."""

    def __init__(self, layers: Sequence[Block], F: Tensor) -> None:
        self._layers, self._F = layers, F

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> ExactInverse:
        """F + gamma^2 I; pi has nothing to split.

        Raises:
            NumericalError: F is not finite (names the layer) or could not be factorised with any jitter.
        """
        self._check_finite()
        (matrix,), _, notices = factor_spd([self._F], [gamma.square()], [("all layers", "F")], keep_lower=False)
        return ExactInverse(self._layers, matrix, notices)

    def _check_finite(self) -> None:
        """Name the layers in whose own block something is wrong: a NaN in one layer spreads over its rows only."""
        parts = torch.split(self._F.diagonal(), [layer.size for layer in self._layers])
        finite = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
        wrong = [layer.name for layer, good in zip(self._layers, finite, strict=True) if not good]
        if wrong:
            raise NumericalError(
                f"{', '.join(wrong)}: the Fisher has NaN or infinite entries; the forward or backward pass overflowed. "
                "Check the data and the initialisation, or start with a larger damping"
            )


class Exact(Approximation):
    """The dense Fisher of all parameters, any graph of layers; refuses nets that are not small."""

    Config = ExactConfig
    config: ExactConfig
    moments = (DenseMoment,)

    def serves(self, block: Block) -> bool:
        """Every block but those of parameters that no layer reads: they have no gradients of single cases."""
        return block.kind != "diagonal"

    def check_layers(self, layers: Sequence[Block]) -> None:
        """Refuse a net above `max_parameters`, by the names and sizes of its layers.

        Raises:
            UnsupportedModelError: The net is too large.
        """
        total, limit = sum(layer.size for layer in layers), self.config.max_parameters
        if total <= limit:
            return
        largest = sorted(layers, key=lambda layer: layer.size, reverse=True)[:3]
        sizes = ", ".join(f"{layer.name} ({layer.d_out} x {layer.d_in} = {layer.size:,})" for layer in largest)
        raise UnsupportedModelError(
            f"approx = 'exact' keeps a dense matrix of all parameters: this net has {total:,}, which would be "
            f"{total**2:,} entries, and the limit is {limit:,}; its largest layers are {sizes}. Use approx = "
            "'blockdiag' or 'tridiag', or raise approx.max_parameters if the memory is there"
        )

    def factorise(self, moments: Moments) -> ExactFactorisation:
        """Copy F, exactly symmetric."""
        (F,) = moments[DenseMoment]
        return ExactFactorisation(moments.layers, (F + F.T).mul_(0.5))

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> ExactInverse:
        """From the matrices."""
        return ExactInverse(layers, Spd(state["base"], state["shift"], state["inverse"]))
