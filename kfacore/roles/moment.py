r"""Running averages of second moments: what an approximation declares and is made of.

A moment sees each mini-batch's samples and averages (method, section 2, step 3)

    X <- f X + (1 - f) X_new,     f = min(1 - 1/k, decay),

so that the first estimate is taken whole and the scale never depends on the batch size. Moments are uncentred.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.samples import LayerSamples

__all__ = ["Moment", "Moments"]


M = TypeVar("M", bound="Moment")


class Moment(ABC):
    """One kind of running average: a tensor for each layer, or for each pair of adjacent layers.

    Attributes:
        values: The averages, in execution order, updated in place; all of the moment's state that is saved. A moment
            with several tensors a layer lists the first of every layer, then the second of every layer, and so on.

    Args:
        layers: The layers, in execution order.
        like: A tensor with the dtype and device of the averages.
    """

    def __init__(self, layers: Sequence[Block], like: Tensor) -> None:
        self.layers = layers
        self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in self.shapes(layers)]

    @abstractmethod
    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """Shape of each value."""

    @abstractmethod
    def update(self, samples: Sequence[LayerSamples], keep: float) -> None:
        """Average the samples' estimate in with weight 1 - keep; old values must not matter at all if keep = 0."""

    def frozen(self: M) -> M:
        """A copy that later updates do not change."""
        twin = copy(self)
        twin.values = [value.clone() for value in self.values]
        return twin

    def refreshed(self, inverse: Inverse) -> None:  # noqa: B027  # optional: most moments have no coordinates
        """Called when an inverse has been taken up, for averages kept in its coordinates; nothing by default."""


class Moments:
    """The moments that an approximation declared, updated together.

    Attributes:
        layers: The layers, in execution order.
        updates: Number of mini-batches seen, k.

    Args:
        kinds: The moment classes.
        layers: The layers.
        like: A tensor with the dtype and device of the averages.
    """

    def __init__(self, kinds: Sequence[type[Moment]], layers: Sequence[Block], like: Tensor) -> None:
        self.layers = layers
        self.updates = 0
        self._by_kind = {kind: kind(layers, like) for kind in kinds}

    def __getitem__(self, kind: type[M]) -> list[Tensor]:
        """The averages of one kind; read-only for everyone but the moment itself."""
        return self._by_kind[kind].values

    def snapshot(self, kind: type[M]) -> list[Tensor]:
        """Copies of the averages of one kind, which later updates do not change."""
        return [value.clone() for value in self[kind]]

    def frozen(self) -> Moments:
        """A copy that later updates do not change, for work that goes on beside them."""
        twin = copy(self)
        twin._by_kind = {kind: moment.frozen() for kind, moment in self._by_kind.items()}
        return twin

    def update(self, samples: Sequence[LayerSamples], decay: float) -> None:
        """Take in a mini-batch with f = min(1 - 1/k, decay)."""
        self.updates += 1
        keep = min(1.0 - 1.0 / self.updates, decay)
        for moment in self._by_kind.values():
            moment.update(samples, keep)

    def refreshed(self, inverse: Inverse) -> None:
        """Tell the moments which inverse is in use now."""
        for moment in self._by_kind.values():
            moment.refreshed(inverse)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and a copy of every average."""
        values = {kind.__name__: self.snapshot(kind) for kind in self._by_kind}
        return {"updates": self.updates, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up averages of the same kinds and shapes.

        Raises:
            ConfigError: The state was made by an approximation with other moments.
        """
        names = {kind.__name__ for kind in self._by_kind}
        if set(state["values"]) != names:
            raise ConfigError(
                f"the saved statistics are {', '.join(sorted(state['values']))}; "
                f"this approximation needs {', '.join(sorted(names))}"
            )
        self.updates = state["updates"]
        for kind, moment in self._by_kind.items():
            # New tensors, so that an inverse which shares one (an eigenbasis, say) is not written to.
            pairs = zip(moment.values, state["values"][kind.__name__], strict=True)
            moment.values = [torch.empty_like(value).copy_(saved) for value, saved in pairs]
