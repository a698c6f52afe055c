r"""Dense curvature matrices of small nets: the exact Fisher, F-tilde, and how far two matrices are apart.

Parameters are ordered layer by layer, the columns of each block [W b] stacked (vec), as in `Inverse.dense`. From the
layer inputs abar and the output gradients g of every case, whose second moment over passes is the model's own
expectation over targets (paper, sections 2.3 and 3),

    F_ij       = E[ (abar_{i-1} abar_{j-1}^T) (x) (g_i g_j^T) ]           the exact Fisher
    F-tilde_ij = E[abar_{i-1} abar_{j-1}^T] (x) E[g_i g_j^T]              its Kronecker-factored approximation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kfacore.curvature.linalg import pi_of
from kfacore.errors import ConfigError
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples, Samples
from kfacore.schema.slots import PiRule

__all__ = [
    "DENSE_LIMIT",
    "Difference",
    "FactorPairs",
    "block_average",
    "block_mask",
    "compare",
    "condition",
    "exact_fisher",
    "inverse_of",
    "stack",
    "unshared",
]

DENSE_LIMIT = 2500
"""Most parameters that a dense matrix is built for unless asked: 50 MB a matrix, seconds an inverse."""

_ROWS = 1 << 24
"""Entries of per-case gradients held at a time."""

_SINGULAR = 1e-13
"""Below this ratio of extreme eigenvalues a matrix counts as singular in double precision."""


def stack(blocks: Sequence[Tensor]) -> Tensor:
    """vec: the columns of each block, layer by layer; (P,)."""
    return torch.cat([block.mT.reshape(-1) for block in blocks])


def exact_fisher(samples: Sequence[LayerSamples]) -> Tensor:
    """Mean over cases of sum over passes of vec(g abar^T) vec(g abar^T)^T, from per-case gradients.

    Args:
        samples: What the layers of interest saw; of the exact Fisher if the passes are its square root
            (`ExactModel.exact_samples`), of the empirical Fisher if they are the training targets' gradients.

    Returns:
        (P, P), P the parameters of these layers.
    """
    cases, passes = samples[0].cases, samples[0].gradients.shape[0]
    total = sum(s.inputs.shape[1] * s.gradients.shape[2] for s in samples)
    F = samples[0].inputs.new_zeros(total, total)
    chunk = max(1, _ROWS // (total * passes))
    for start in range(0, cases, chunk):
        rows = torch.cat([_case_gradients(s, start, start + chunk) for s in samples], dim=1)
        F.addmm_(rows.T, rows)
    return F / cases


def _case_gradients(sample: LayerSamples, start: int, stop: int) -> Tensor:
    """Rows vec(g abar^T), one a pass and case, (k c, d_in d_out)."""
    a, g = sample.inputs[start:stop], sample.gradients[:, start:stop]
    return torch.einsum("ni,kno->knio", a, g).flatten(0, 1).flatten(1)


def unshared(layers: Sequence[Block], samples: Samples) -> dict[str, str]:
    """Blocks for which F-tilde is not defined beside the first of them for which it is, with the reason."""
    reasons: dict[str, str] = {}
    first: tuple[str, int] | None = None
    for layer, s in zip(layers, samples, strict=True):
        if s is None:
            reasons[layer.name] = "these examples did not use it"
        elif not layer.plain:
            reasons[layer.name] = f"its curvature is {_form(layer)}, no product of two whole factors"
        elif first is not None and s.gradients.shape[1] != first[1]:
            reasons[layer.name] = (
                f"it has {s.gradients.shape[1]} rows and {first[0]} has {first[1]}, so no row in common"
            )
        elif first is None:
            first = layer.name, s.gradients.shape[1]
    return reasons


def _form(layer: Block) -> str:
    if layer.kind != "kron":
        return f"'{layer.kind}'"
    return f"one of {layer.groups} groups each" if layer.groups > 1 else "a product with a diagonal side"


@dataclass(frozen=True)
class FactorPairs:
    """F-tilde's factors of every pair of layers.

    Attributes:
        A: A[i][j] = E[abar_{i-1} abar_{j-1}^T], (d_in of i, d_in of j).
        G: G[i][j] = E[g_i g_j^T], (d_out of i, d_out of j).
    """

    A: list[list[Tensor]]
    G: list[list[Tensor]]

    @classmethod
    def of(cls, samples: Sequence[LayerSamples]) -> FactorPairs:
        """A means over rows, G sums over passes and rows by S: defined for blocks that share their rows."""
        count, divisor = samples[0].rows, samples[0].divisor
        rows = [s.gradients.flatten(0, 1) for s in samples]
        return cls(
            [[s.inputs.T @ t.inputs / count for t in samples] for s in samples],
            [[g.T @ h / divisor for h in rows] for g in rows],
        )

    def damped(self, gamma: float, *, pi: PiRule = "layer") -> FactorPairs:
        """Factored Tikhonov damping of the diagonal pairs (paper, section 6.3); the others are kept."""
        A, G = [list(row) for row in self.A], [list(row) for row in self.G]
        own_A, own_G = ([row[i] for i, row in enumerate(rows)] for rows in (A, G))
        for i, (a, g, split) in enumerate(zip(own_A, own_G, pi_of(own_A, own_G, pi), strict=True)):
            A[i][i] = a + split * gamma * torch.eye(len(a), dtype=a.dtype, device=a.device)
            G[i][i] = g + gamma / split * torch.eye(len(g), dtype=g.dtype, device=g.device)
        return FactorPairs(A, G)

    def matrix(self) -> Tensor:
        """F-tilde, (P, P)."""
        count = range(len(self.A))
        rows = [torch.cat([torch.kron(self.A[i][j], self.G[i][j]) for j in count], dim=1) for i in count]
        return torch.cat(rows)

    def sizes(self) -> list[int]:
        """Parameters of each layer."""
        return [self.A[i][i].shape[0] * self.G[i][i].shape[0] for i in range(len(self.A))]


@dataclass(frozen=True)
class Difference:
    """How far a matrix is from the one it stands for.

    Attributes:
        frobenius: ||X - Y||_F / ||Y||_F.
        spectral: ||X - Y||_2 / ||Y||_2.
        diagonal: The Frobenius error over the diagonal blocks alone, relative to their own norm.
        off_diagonal: The same over all other blocks; None if there are none.
    """

    frobenius: float
    spectral: float
    diagonal: float
    off_diagonal: float | None

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {
            "frobenius": self.frobenius,
            "spectral": self.spectral,
            "diagonal_blocks": self.diagonal,
            "off_diagonal_blocks": self.off_diagonal,
        }


def compare(X: Tensor, Y: Tensor, sizes: Sequence[int]) -> Difference:
    """Relative errors of X against Y, both symmetric (P, P).

    Args:
        X: The approximation.
        Y: What it stands for; not zero.
        sizes: Parameters of each layer, which define the blocks.
    """
    error = X - Y
    mask = block_mask(sizes, Y.device)
    rest = float((Y * ~mask).norm())
    return Difference(
        frobenius=float(error.norm() / Y.norm()),
        spectral=_spectral(error) / _spectral(Y),
        diagonal=float((error * mask).norm() / (Y * mask).norm()),
        off_diagonal=float((error * ~mask).norm()) / rest if rest > 0 else None,
    )


def block_mask(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Which entries lie in diagonal blocks, (P, P) of bool."""
    owner = torch.repeat_interleave(torch.tensor(list(sizes), device=device))
    return owner[:, None] == owner[None, :]


def block_average(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean of the entries' absolute values in each block, (L, L) (the paper's Figure 2, right)."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    spans = [slice(a, b) for a, b in pairwise(offsets)]
    return torch.stack([torch.stack([matrix[r, c].abs().mean() for c in spans]) for r in spans])


def condition(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a symmetric matrix."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


def inverse_of(matrix: Tensor, what: str) -> Tensor:
    """The inverse of a symmetric positive definite matrix.

    Args:
        matrix: (P, P).
        what: Its name, for the message.

    Raises:
        ConfigError: It is singular in double precision.
    """
    smallest, largest = condition(matrix)
    if not smallest > _SINGULAR * largest:
        raise ConfigError(
            f"{what} has no inverse: its eigenvalues go from {smallest:.3g} to {largest:.3g}; use a larger damping or "
            "more examples"
        )
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).abs().max())
