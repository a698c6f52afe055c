"""A damped factor with its inverse, and roots of it, which cross moments need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CholeskyRoot", "Root", "Spd", "shifted"]


@dataclass(frozen=True)
class Spd:
    """A damped factor X + shift I with its inverse.

    Attributes:
        base: X, symmetric, (d, d); shared by all candidates of gamma.
        shift: What was added to the diagonal, a scalar on the device.
        inverse: (X + shift I)^-1.
    """

    base: Tensor
    shift: Tensor
    inverse: Tensor

    def times(
        self,
        V: Tensor,  # (d, m)
    ) -> Tensor:
        """(X + shift I) V."""
        return torch.addmm(V * self.shift, self.base, V)


class Root(ABC):
    """B of a damped factor D = B B^T that cross moments need, and what whitens the damped moments it was made from."""

    @abstractmethod
    def whiten(
        self,
        X: Tensor,  # (d, m)
    ) -> Tensor:
        """W X, where W Xd W^T = I for the damped moments Xd."""

    @abstractmethod
    def color(
        self,
        V: Tensor,  # (d, m)
    ) -> Tensor:
        """B V."""

    @abstractmethod
    def dual(
        self,
        V: Tensor,  # (d, m)
    ) -> Tensor:
        """B^-T V."""


class CholeskyRoot(Root):
    """D = Xd = L L^T.

    Args:
        L: The Cholesky factor; None makes it when it is asked for, where another process has factorised D.
        factor: D; needed without an L.
    """

    def __init__(self, L: Tensor | None, factor: Spd | None = None) -> None:
        self._L, self._factor = L, factor

    def _lower(self) -> Tensor:
        if self._L is None:
            assert self._factor is not None
            lower: Tensor = torch.linalg.cholesky_ex(shifted(self._factor.base, self._factor.shift)).L
            self._L = lower
        return self._L

    def whiten(self, X: Tensor) -> Tensor:
        """L^-1 X."""
        white: Tensor = torch.linalg.solve_triangular(self._lower(), X, upper=False)
        return white

    def color(self, V: Tensor) -> Tensor:
        """L V."""
        return self._lower() @ V

    def dual(self, V: Tensor) -> Tensor:
        """L^-T V."""
        result: Tensor = torch.linalg.solve_triangular(self._lower().T, V, upper=True)
        return result


def shifted(base: Tensor, shift: Tensor) -> Tensor:
    """X + shift I, in the dtype of X."""
    damped = base.clone()
    damped.diagonal().add_(shift.to(base.dtype))
    return damped
