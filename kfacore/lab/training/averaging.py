"""Iterate averaging: the running average of the parameters that is reported beside the current ones.

Source: Martens & Grosse 2015, section 13; method, section 2, step 9. Built on torch's `AveragedModel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["IterateAverage"]


class IterateAverage:
    """avg <- f avg + (1 - f) theta from step `start` on, with f = min(1 - 1/(k - start + 1), decay).

    The first average is theta itself, the next ones plain means of all iterates until their weight reaches `decay`,
    then an exponential average. It never enters the training.

    Args:
        model: The model, before an optimizer has attached anything to it: it is copied.
        start: The first step that counts.
        decay: Largest weight of the past, in (0, 1).
    """

    def __init__(self, model: nn.Module, *, start: int, decay: float) -> None:
        self.start = max(start, 1)
        self.decay = decay
        self._weight = 1.0
        self._average = AveragedModel(model, multi_avg_fn=self._blend)
        self._average.requires_grad_(False)

    @property
    def model(self) -> nn.Module | None:
        """The model with averaged parameters, or None before step `start`."""
        return self._average.module if int(self._average.n_averaged) > 0 else None

    def factor(self, step: int) -> float:
        """The weight f of the past at step k."""
        return min(1.0 - 1.0 / (step - self.start + 1), self.decay)

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the parameters after step k.

        Args:
            model: The model being trained.
            step: k, from 1.
        """
        if step < self.start:
            return
        self._weight = 1.0 - self.factor(step)
        self._average.update_parameters(model)

    def _blend(
        self,
        averages: tuple[Tensor, ...] | list[Tensor],
        parameters: tuple[Tensor, ...] | list[Tensor],
        count: Tensor | int,
    ) -> None:
        # The weight comes from the step, not from torch's count, which would have to be read.
        torch._foreach_lerp_(averages, parameters, self._weight)

    def state_dict(self) -> dict[str, Any]:
        """Averaged parameters and how many iterates they hold."""
        return dict(self._average.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self._average.load_state_dict(state)
