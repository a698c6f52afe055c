"""The parameters as they were before the last step, so that a step can be undone exactly.

A copy, not the step subtracted again: a step that has to be undone may be so large that rounding has eaten what was
there, or not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from kfacore.network import BlockVector

__all__ = ["Keeper"]


class Keeper:
    """Copies parameters and puts them back.

    Attributes:
        full: Whether there is a copy.
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []
        self.full = False

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Remember the parameters as they are now, in memory that is taken once."""
        if not self._copies:
            self._copies = [parameter.clone() for parameter in parameters]
        else:
            torch._foreach_copy_(self._copies, list(parameters))
        self.full = True

    def state(self) -> list[Tensor] | None:
        """The copy, copied; a run that goes on looks back as it would have."""
        return [copy.clone() for copy in self._copies] if self.full else None

    def load(self, state: Sequence[Tensor] | None, parameters: Sequence[Tensor]) -> None:
        """Take up what `state` gave, on the device and in the dtype of the parameters."""
        self.full = state is not None
        self._copies = [s.to(p, copy=True) for s, p in zip(state or (), parameters, strict=self.full)]

    @contextmanager
    def swapped(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """For a while the copy in the parameters' place. Their graph stays valid: they are then what they were."""
        now = [parameter.clone() for parameter in parameters]
        with _unsafe_preserve_version_counter(tuple(parameters)):
            torch._foreach_copy_(list(parameters), self._copies)
            try:
                yield
            finally:
                torch._foreach_copy_(list(parameters), now)

    def shorten(self, parameters: Sequence[Tensor], delta: BlockVector, share: float) -> None:
        """Take a share of the step, from the copy; the step becomes what was taken."""
        delta.flat.mul_(share)
        torch._foreach_copy_(list(parameters), self._copies)
        torch._foreach_add_(list(parameters), delta.parts)

    def restore(self, parameters: Sequence[Tensor], delta: BlockVector, kept: Tensor | None = None) -> None:
        """Put the parameters back and forget the step; both where the device says so, if the host does not know.

        Args:
            parameters: Receive the copy.
            delta: The step, which becomes zero.
            kept: (), bool: nothing is done where it is true. None undoes in any case.
        """
        if kept is None:
            torch._foreach_copy_(list(parameters), self._copies)
            delta.flat.zero_()
            return
        for parameter, copy in zip(parameters, self._copies, strict=True):
            parameter.copy_(torch.where(kept, parameter, copy))
        delta.flat.copy_(torch.where(kept, delta.flat, torch.zeros_like(delta.flat)))
