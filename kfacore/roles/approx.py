"""The role of an approximation of the Fisher: moments -> factorisation -> damped, immutable inverse.

Nothing here assumes that blocks are independent: an inverse acts on all layers' blocks at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from kfacore.config.slots import ApproxConfig, PiRule
from kfacore.layers import LayerInfo
from kfacore.roles.base import Part

if TYPE_CHECKING:
    from kfacore.moments import Moment, Moments

__all__ = ["Approximation", "Factorisation", "Inverse", "Notice"]


@dataclass(frozen=True)
class Notice:
    """Something that must not pass in silence: a factor that needed double precision or more jitter.

    Attributes:
        layer: Name of the layer.
        message: What happened and what was done.
    """

    layer: str
    message: str

    def __str__(self) -> str:
        """Layer first, as people look for it."""
        return f"{self.layer}: {self.message}"


class Inverse(ABC):
    """A damped approximation F-hat at one gamma, ready to be applied. Immutable.

    Blocks are the layers' weight blocks (d_out, d_in), in execution order.
    """

    layers: Sequence[LayerInfo]
    notices: tuple[Notice, ...] = ()

    @abstractmethod
    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 v."""

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """F-hat^-1 v written over ``out``; worth an implementation where it saves the copy."""
        torch._foreach_copy_(list(out), self.solve(blocks))

    @abstractmethod
    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat v, the inverse of `solve`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and containers from which the approximation's `load_inverse` restores it bit for bit."""

    def dense(self, *, inverse: bool = True) -> Tensor:
        """The matrix of `solve` (or of `multiply`), for small nets: parameters layer by layer, columns stacked.

        Returns:
            (P, P), in the blocks' dtype; vec stacks the columns of each (d_out, d_in) block.
        """
        apply = self.solve if inverse else self.multiply
        probe = self._like()
        total = sum(layer.size for layer in self.layers)
        columns = []
        for position in range(total):
            unit = torch.zeros(total, dtype=probe.dtype, device=probe.device)
            unit[position] = 1.0
            blocks, start = [], 0
            for layer in self.layers:
                blocks.append(unit[start : start + layer.size].reshape(layer.d_in, layer.d_out).T)
                start += layer.size
            columns.append(torch.cat([block.T.reshape(-1) for block in apply(blocks)]))
        return torch.stack(columns, dim=1)

    @abstractmethod
    def _like(self) -> Tensor:
        """Any tensor of the inverse, for its dtype and device."""


class Factorisation(ABC):
    """What of an inverse does not depend on gamma; shared by all candidates."""

    @abstractmethod
    def damped(
        self,
        gamma: Tensor,  # ()
        *,
        pi: PiRule = "layer",
    ) -> Inverse:
        """The inverse with factored Tikhonov damping gamma (method, section 3).

        Args:
            gamma: Strength, a scalar on the device.
            pi: How gamma is split between the factors, see `kfacore.linalg.pi_of`.

        Raises:
            NumericalError: No factorisation of some layer's factor was finite; the message names the layer.
        """


class Approximation(Part):
    """An approximation of the Fisher: the moments it needs and how to invert them.

    Attributes:
        moments: The running averages it needs; several approximations may share one.
        structure: ``"any"`` graph of layers, or ``"chain"`` if each layer must feed the next one only.
    """

    config: ApproxConfig
    moments: ClassVar[tuple[type[Moment], ...]]
    structure: ClassVar[Literal["any", "chain"]] = "any"

    def check_layers(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers that this approximation cannot serve, before memory is taken; nothing by default.

        Args:
            layers: The layers; before the first forward pass in order of registration, then of execution.

        Raises:
            UnsupportedModelError: The message names the layers and says what to use instead.
        """

    @abstractmethod
    def factorise(self, moments: Moments) -> Factorisation:
        """Prepare inverses from the moments as they are now; no copies are needed.

        The moments stay as they are while the factorisation is in use. Its inverses live on while they are updated,
        so an inverse must not share a tensor with them that updates write to.

        Raises:
            NumericalError: Something that does not depend on gamma failed (an eigenproblem, say); names the layer. The
                inverse in use is then kept, as if every gamma had failed.
        """

    @abstractmethod
    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[LayerInfo]) -> Inverse:
        """Restore an inverse of this approximation from its `Inverse.state_dict`, bit for bit."""
