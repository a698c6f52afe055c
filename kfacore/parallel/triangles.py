"""Symmetric matrices as half as many numbers, for the way from one process to another.

Of X = [A, B; B^T, C] with A of ceil(d / 2) rows, B travels as it is, and the upper triangle of A and the lower one of C
share a rectangle: d (d + 1) / 2 numbers in all, moved by a few whole-matrix copies whatever the size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["folded", "folded_size", "unfolded"]


def folded_size(d: int) -> int:
    """Numbers of a symmetric matrix (d, d) as `folded` gives it."""
    return d * (d + 1) // 2


def folded(
    X: Tensor,  # (..., d, d), symmetric: its lower half is not read but for C
) -> Tensor:  # (..., d (d + 1) / 2)
    """The numbers of symmetric matrices, each pair once."""
    d = X.shape[-1]
    half, low = (d + 1) // 2, d // 2
    odd = d % 2
    A, B, C = X[..., :half, :half], X[..., :half, half:], X[..., half:, half:]
    rest = X.new_zeros(*X.shape[:-2], half, half + 1 - odd)
    rest[..., :, 1 - odd :] = A.triu()
    rest[..., odd:, :low] += C.mT.tril()
    return torch.cat([B.flatten(-2), rest.flatten(-2)], -1)


def unfolded(
    values: Tensor,  # (..., d (d + 1) / 2)
    d: int,
) -> Tensor:  # (..., d, d)
    """The symmetric matrices that `folded` gave, exactly symmetric and in rows."""
    half, low = (d + 1) // 2, d // 2
    odd = d % 2
    B, rest = values[..., : half * low], values[..., half * low :]
    B = B.reshape(*values.shape[:-1], half, low)
    rest = rest.reshape(*values.shape[:-1], half, half + 1 - odd)
    X = values.new_empty(*values.shape[:-1], d, d)
    upper, lower = rest[..., :, 1 - odd :].triu(), rest[..., odd:, :low].tril()
    X[..., :half, :half] = upper + upper.triu(1).mT
    X[..., half:, half:] = lower + lower.tril(-1).mT
    X[..., :half, half:] = B
    X[..., half:, :half] = B.mT
    return X
