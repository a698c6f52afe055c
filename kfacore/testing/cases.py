r"""Small statistics for the approximations' suite, with their second moments as dense matrices.

Parameter vectors are those of `kfacore.roles.Inverse.dense`: layer by layer, the columns of each (d_out, d_in) block
stacked, so that a Kronecker-factored block is A (x) G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments
from kfacore.roles.samples import LayerSamples, Samples
from kfacore.schema.slots import PiRule

__all__ = ["ApproxCase", "chain_case"]


@dataclass(frozen=True)
class ApproxCase:
    """What an estimator saw of a small chain of layers in one or more mini-batches, in double precision.

    Attributes:
        layers: The layers.
        batches: One entry a mini-batch: what each layer saw.
    """

    layers: list[Block]
    batches: list[list[LayerSamples]]

    @property
    def size(self) -> int:
        """Number of parameters, P."""
        return sum(layer.size for layer in self.layers)

    def input_factor(self, i: int, j: int | None = None) -> Tensor:
        """Mean of abar_i abar_j^T over rows and mini-batches, (d_in of i, d_in of j); j = i if left out."""
        j = i if j is None else j
        return self._mean([s[i].inputs.T @ s[j].inputs / len(s[i].inputs) for s in self.batches])

    def output_factor(self, i: int, j: int | None = None) -> Tensor:
        """Mean over cases of g_i g_j^T, summed over passes and rows, (d_out of i, d_out of j); j = i if left out."""
        j = i if j is None else j
        rows = [(s[i].gradients.flatten(0, 1), s[j].gradients.flatten(0, 1), s[0].cases) for s in self.batches]
        return self._mean([g.T @ h / n for g, h, n in rows])

    def per_case(self) -> Tensor:
        """vec(sum over its rows of g abar^T) of every case and pass, all layers side by side, (., P).

        Scaled so that F = rows^T rows.
        """
        found = []
        for s in self.batches:
            scale = (s[0].cases * len(self.batches)) ** -0.5
            parts = [self._gradients(layer).flatten(2) for layer in s]
            found.append(torch.cat(parts, dim=2).flatten(0, 1) * scale)
        return torch.cat(found)

    @staticmethod
    def _gradients(s: LayerSamples) -> Tensor:
        """Transposed gradients of cases, (k, n, d_in, d_out)."""
        each = torch.einsum("kro,ri->krio", s.gradients, s.inputs)  # of rows
        return each.reshape(len(each), s.cases, -1, *each.shape[2:]).sum(2)

    def damped(self, i: int, gamma: float, *, pi: PiRule) -> tuple[Tensor, Tensor]:
        """Ad_i = A_i + pi_i gamma I and Gd_i = G_i + gamma / pi_i I (method, section 3), pi_i by its rule."""
        A, G = self.input_factor(i), self.output_factor(i)
        logs = [self._log_pi(j) for j in range(len(self.layers))]
        split = math.exp({"layer": logs[i], "net": sum(logs) / len(logs), None: 0.0}[pi])
        return (
            A + split * gamma * torch.eye(len(A), dtype=A.dtype),
            G + gamma / split * torch.eye(len(G), dtype=G.dtype),
        )

    def _log_pi(self, i: int) -> float:
        mean_A, mean_G = (float(X.diagonal().mean()) for X in (self.input_factor(i), self.output_factor(i)))
        return 0.5 * math.log(mean_A / mean_G)

    def moments(
        self,
        approx: Approximation,
        *,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        batches: int | None = None,
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> Moments:
        """The running averages that the approximation declares, after the first mini-batches (all if left out)."""
        found = Moments(approx.moments, self.layers, torch.zeros((), dtype=dtype, device=device), pairs)
        for samples in self.batches[:batches]:
            feed(found, samples)
        return found

    def blocks(self, seed: int = 0, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Random weight blocks."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [layer.shape for layer in self.layers]
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]

    @staticmethod
    def _mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(0)


def feed(moments: Moments, samples: Samples) -> None:
    """Update with samples cast to the moments' dtype and device; the plain mean over mini-batches."""
    like = next(iter(moments.state_dict()["values"].values()))[0]
    moments.update([s and replace(s, inputs=s.inputs.to(like), gradients=s.gradients.to(like)) for s in samples], 0.999)


def chain_case(
    sizes: Sequence[int],
    *,
    bias: bool = True,
    cases: int = 24,
    passes: int = 1,
    batches: int = 2,
    dead: bool = False,
    positions: int = 1,
    seed: int = 0,
) -> ApproxCase:
    """Statistics of a tanh chain with random weights, so that adjacent layers are correlated.

    Args:
        sizes: Widths (d_0, ..., d_L).
        bias: Whether layers have biases.
        cases: Cases a mini-batch.
        passes: Backward passes a mini-batch.
        batches: Mini-batches.
        dead: The first input is always 0, and the first unit of every layer gets no gradient.
        positions: Rows a case, as of a sequence.
        seed: Seed of every draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pairs = list(pairwise(sizes))
    layers = [Block(f"layer{i}", a + bias, b, bias) for i, (a, b) in enumerate(pairs)]
    weights = [draw(b, a) / a**0.5 for a, b in pairs]
    found, rows = [], cases * positions
    for _ in range(batches):
        inputs, a = [], draw(rows, sizes[0])
        for W in weights:
            if dead:
                a = torch.cat([torch.zeros(rows, 1, dtype=a.dtype), a[:, 1:]], 1)
            inputs.append(a)
            a = (a @ W.T).tanh()
        gradients: list[Tensor] = []
        g = draw(passes, rows, sizes[-1])
        for i in reversed(range(len(layers))):
            if dead:
                g = torch.cat([torch.zeros(passes, rows, 1, dtype=g.dtype), g[:, :, 1:]], 2)
            gradients.insert(0, g)
            g = (g @ weights[i]) * (1 - inputs[i].square() if i else 1.0)
        ones = torch.ones(rows, 1, dtype=torch.float64)
        abar = [torch.cat([a, ones], 1) if bias else a for a in inputs]
        found.append([LayerSamples(a, g, positions) for a, g in zip(abar, gradients, strict=True)])
    return ApproxCase(layers, found)
