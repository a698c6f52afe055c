"""An optimizer around another one, with that one's groups and state: schedulers and trainers see one optimizer."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Sharing"]


class Sharing(torch.optim.Optimizer):
    """Groups, state and defaults of the optimizer inside, also after that one has bound new ones.

    Args:
        base: The optimizer inside.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        torch.optim.Optimizer.__setstate__(self, {})  # hooks and the profiler's wrapper, but no groups of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base's own."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's own."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the base a group."""
        self.base.add_param_group(param_group)

    def own(self) -> list[torch.Tensor]:
        """All parameters, in order."""
        return [p for group in self.param_groups for p in group["params"]]
