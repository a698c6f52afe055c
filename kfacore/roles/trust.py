"""The role of trust: whether a step is kept, and when that is asked."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfacore.roles.base import Part
from kfacore.schema.slots import TrustConfig

__all__ = ["Trust"]


class Trust(Part):
    """Accepts a step or has it undone, by what the objective h did (a phase of the step, after the parameters moved).

    Asking costs a forward pass. Nothing here waits for the device; numbers are handed over as Python floats by callers
    that may wait: on a CPU, where that costs nothing, and on a device where the rule says so (`every_step`).

    Attributes:
        early: What lambda is multiplied with when a step was undone by its own mini-batch.
        late: Likewise by the next one.
        shortest: Share of its length below which a step is undone rather than shortened.
    """

    config: TrustConfig
    early: ClassVar[float] = 10.0
    late: ClassVar[float] = 2.0
    shortest: ClassVar[float] = 1.0

    @abstractmethod
    def asks(self, step: int) -> bool:
        """Whether h after this step is wanted, beyond the steps that adapt lambda and compute it anyway."""

    def wonders(self, objective: float, predicted: float) -> bool:
        """Whether h after a step is wanted because of what the quadratic model promises of it.

        Args:
            objective: h before the step.
            predicted: The change of h that the model promises.
        """
        return False

    @abstractmethod
    def attempts(self, step: int) -> int:
        """How often a mini-batch may be solved, each time with a larger lambda, before its step is given up."""

    @abstractmethod
    def accepts(
        self,
        before: Tensor,  # () float64
        change: Tensor,  # () float64
    ) -> Tensor:  # () bool
        """Whether a step that changes h by ``change`` on its own mini-batch is kept; NaN is no change to keep."""

    def believes(
        self,
        before: Tensor,  # () float64
        change: Tensor,  # () float64
        predicted: Tensor,  # () float64
    ) -> Tensor:  # () bool
        """Whether a step that was asked about and lowered h did enough of what it promised; by default any amount.

        Args:
            before: h before the step.
            change: What the step changed it by, on its own mini-batch.
            predicted: What the quadratic model promised.
        """
        return torch.ones_like(change, dtype=torch.bool)

    @abstractmethod
    def doubts(self, objective: float) -> bool:
        """Whether h of a new mini-batch, before its step, makes the step before it doubtful."""

    @abstractmethod
    def disowns(self, now: float, earlier: float) -> bool:
        """Whether a doubtful step is undone, by h of the new mini-batch with it and without it."""

    def judged(self, step: int, accepted: bool) -> None:  # optional: not every rule looks back
        """Told what became of a step that was asked about."""

    def saw(self, objective: float) -> None:  # optional, likewise
        """Told h of a mini-batch before its step, as soon as somebody has read it."""

    @property
    def looks_back(self) -> bool:
        """Whether `doubts` can ever be true, so that it is worth asking."""
        return False

    @property
    def every_step(self) -> bool:
        """Whether numbers of every step are read for this rule, also where that waits for the device."""
        return self.looks_back

    def state_dict(self) -> dict[str, Any]:
        """Numbers and containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # optional: most rules remember nothing
        """Take up a state from `state_dict`."""
