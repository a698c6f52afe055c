"""The role of an approximation of the Fisher: moments -> factorisation -> damped, immutable inverse.

Nothing here assumes that blocks are independent: an inverse acts on all layers' blocks at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from kfacore.roles.base import Part
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment, Moments
from kfacore.schema.slots import ApproxConfig, PiRule

__all__ = ["Approximation", "Factorisation"]


class Factorisation(ABC):
    """What of an inverse does not depend on gamma; shared by all candidates."""

    @abstractmethod
    def damped(
        self,
        gamma: Tensor,  # ()
        *,
        pi: PiRule = "layer",  # or a scalar, see below
    ) -> Inverse:
        """The inverse with factored Tikhonov damping gamma (method, section 3).

        Args:
            gamma: Strength, a scalar on the device.
            pi: How gamma is split between the factors, see `kfacore.curvature.linalg.pi_of`. A scalar, one pi for all
                blocks, comes only where `log_pi` gives something.

        Raises:
            NumericalError: No factorisation of some layer's factor was finite; the message names the layer.
        """

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Sum of log pi_i over its blocks that are alive, and their number: `kfacore.curvature.linalg.log_pi_of`.

        With it ``pi = "net"`` is the geometric mean over all blocks of a net, those that others serve too: `damped`
        then gets it as a scalar, which `kfacore.curvature.linalg.pi_of` understands. None, the default: this
        approximation takes the mean over its own blocks, or has nothing to split.
        """
        return None


class Approximation(Part):
    """An approximation of the Fisher: the moments it needs and how to invert them.

    Attributes:
        moments: The running averages it needs; several approximations may share one.
        structure: ``"any"``, or ``"chain"`` if it couples blocks that follow each other: then the network says which
            pairs do, as `Moments.pairs`. A block without a neighbour stands alone.
        damps_each: Whether `Factorisation.damped` takes a gamma for each block, a vector; others get one for all.
        divides: Whether blocks that no pair couples, directly or through others, have nothing to do with each other:
            an inverse made of some of them is that part of the inverse of all, if `Factorisation.log_pi` tells what
            ``pi = "net"`` needs. Then processes may keep a part each (``memory = "owner"``).
    """

    config: ApproxConfig
    moments: ClassVar[tuple[type[Moment], ...]]
    structure: ClassVar[Literal["any", "chain"]] = "any"
    damps_each: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    def serves(self, block: Block) -> bool:
        """Whether it preconditions this block; the others get built-in curvature, see `kfacore.curvature.joined`.

        By default one Kronecker product of two whole factors, whose samples are rows (cases R, d_in) and gradients
        (passes, cases R, d_out), R rows a case: embeddings, norms, grouped convolutions are no concern of most.
        """
        return block.plain

    def check_layers(self, layers: Sequence[Block]) -> None:
        """Refuse layers that this approximation cannot serve, before memory is taken; nothing by default.

        Args:
            layers: The blocks that it serves; before the first forward pass in order of registration, then of
                execution.

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
    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> Inverse:
        """Restore an inverse of this approximation from its `Inverse.state_dict`, bit for bit."""
