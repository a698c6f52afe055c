"""The floating-point operations that a step cannot do without, and the rate at which this machine multiplies matrices.

Operations at that rate are the arithmetic limit; a step's share of the limit is how much of its time they explain.
Counted are matrix products and factorisations (method, section 8, with the first layer's absent terms left out);
everything else is vector work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import torch

__all__ = ["kfac_operations", "multiplication_rate", "sgd_operations"]


def _blocks(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(d_in + 1, d_out) of each layer."""
    return [(before + 1, after) for before, after in pairwise(widths)]


def sgd_operations(widths: Sequence[int], cases: int) -> float:
    """Forward, backward and weight gradients: 6 m P, less the gradient of the inputs that nobody asks for."""
    blocks = _blocks(widths)
    return 6.0 * cases * sum(a * b for a, b in blocks) - 2.0 * cases * blocks[0][0] * blocks[0][1]


def kfac_operations(
    widths: Sequence[int],
    cases: int,
    approx: str,
    *,
    tau1: float = 0.125,
    tau2: float = 0.25,
    lambda_every: int = 5,
    refresh_every: int = 20,
    tempered: bool = False,
) -> float:
    """Operations of a mean K-FAC step with one refresh every T_3 steps.

    Args:
        widths: Of the chain, inputs and outputs included.
        cases: m.
        approx: ``"blockdiag"``, or ``"tridiag"`` without truncation.
        tau1: Share of the cases in the statistics.
        tau2: Share of the cases in the quadratic model.
        lambda_every: T_1; each costs a forward pass.
        refresh_every: T_3.
        tempered: Whether ``approx.power`` is below 1.
    """
    blocks = _blocks(widths)
    P, first = sum(a * b for a, b in blocks), blocks[0][0] * blocks[0][1]
    total = sgd_operations(widths, cases)
    total += 2 * tau1 * cases * (P - first)  # sampled backward pass
    total += 2 * tau1 * cases * sum(a * a + b * b for a, b in blocks)  # A and G
    total += 2 * tau2 * cases * (4 * P - 2 * first)  # J v, two directions
    total += 2 * cases * P / lambda_every  # rho
    total += 2 * sum(b * b * a + b * a * a for a, b in blocks)  # Gd^-1 V Ad^-1
    # Cholesky and inverse, 1/3 + 2/3; or an eigenproblem (about 9 d^3) and a product.
    total += (11 if tempered else 1) * sum(a**3 + b**3 for a, b in blocks) / refresh_every
    if approx == "blockdiag":
        return total
    dense = 2 if tempered else 1  # eigenvectors are full where Cholesky factors are triangular
    for (a, b), (c, d) in pairwise(blocks):
        total += 2 * tau1 * cases * (a * c + b * d)  # Ax and Gx
        p, q = min(a, c), min(b, d)  # canonical correlations of the pair
        for width, height in ((a, b), (c, d)):  # K_G^T V K_A and back, Z_G^T V Z_A and back
            total += 2 * 2 * min(q * height * width + q * width * p, height * width * p + q * height * p)
        for n, k in ((a, c), (b, d)):
            low = min(n, k)
            # The whitened cross moment, its Gram matrix, the eigenproblem, and the vectors of both layers.
            total += (dense * (n + k) * n * k + 4 * n * k * low + 9 * low**3) / refresh_every
            total += dense * (n * n + k * k) * low / refresh_every
    return total


def multiplication_rate(device: torch.device, size: int = 1000, turns: int = 25) -> float:
    """Operations a second of a float32 matrix product of the size of the layers, median over some."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator).to(device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / median(seconds)
