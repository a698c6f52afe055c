"""Memory that `KFAC` keeps from step to step: running averages, inverses, and vectors as long as the parameters.

Averages and vectors are known from the blocks' sizes. An inverse keeps a damped factor and its inverse for most
averages, so before there is one it counts as twice them; afterwards it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kfacore.curvature.owned import Owned, shares
from kfacore.curvature.places import averages
from kfacore.nest import tensors_of
from kfacore.network.vectors import entries_of

if TYPE_CHECKING:
    from kfacore.curvature.joined import Joined
    from kfacore.optim.kfac import KFAC

__all__ = ["Memory", "amount", "block_memory", "divided"]

_GROUPS = 2, 4, 8
"""Numbers of processes of which is told what the one that keeps most would keep."""

_INVERSE = 2
"""Numbers of an inverse for each of the averages that it is made of: a damped factor and its inverse."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        moments: The running averages.
        factors: The inverse in use; as much again for every candidate of gamma while they are compared.
        vectors: Gradient, steps and copies of the parameters.
    """

    moments: int = 0
    factors: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.moments + self.factors + self.vectors

    def record(self) -> dict[str, int]:
        """As plain values."""
        return asdict(self) | {"total": self.total}

    def __add__(self, other: Memory) -> Memory:
        """Both together."""
        return Memory(self.moments + other.moments, self.factors + other.factors, self.vectors + other.vectors)

    def __str__(self) -> str:
        """The three, for people."""
        parts = {"moments": self.moments, "factors of the inverse": self.factors, "vectors": self.vectors}
        return ", ".join(f"{name} {amount(size)}" for name, size in parts.items())


def amount(size: int) -> str:
    """Bytes for people, in kB, MB or GB of powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def block_memory(optimizer: KFAC, joined: Joined) -> tuple[list[Memory], Memory]:
    """What each block takes in this process, and what belongs to all of them together."""
    infos = [block.info for block in optimizer.linearizer.layers]
    size = optimizer.linearizer.layers[0].parameters[0].element_size()
    moments, together = [0] * len(infos), 0
    pre = optimizer.preconditioner
    here = set(pre.groups[optimizer.ranks.rank]) if isinstance(pre, Owned) else set(range(len(infos)))
    for average in averages(joined):
        if average.block is None:
            together += average.entries * size
        elif average.block in here:
            moments[average.block] += average.entries * size
    scale = _factor_scale(optimizer, sum(moments) + together)
    vectors = _vectors(optimizer)
    each = [
        Memory(kept, round(kept * scale), vectors * entries_of(info) * size)
        for kept, info in zip(moments, infos, strict=True)
    ]
    return each, Memory(together, round(together * scale))


def divided(optimizer: KFAC, joined: Joined, each: list[Memory]) -> tuple[tuple[int, int], ...]:
    """Numbers of processes, and bytes of averages and factors that the one of them keeps which keeps most.

    Of this process's group where there are several; of groups that there might be where there is one. Nothing where
    all processes keep everything.

    Args:
        optimizer: The optimizer.
        joined: Who serves which blocks.
        each: What each block takes, see `block_memory`; of one process.
    """
    if optimizer.approx.config.memory == "all" or not optimizer.ranks.alone:
        return ()
    return tuple(
        (count, max(sum(each[i].moments + each[i].factors for i in own) for own in shares(joined, count)))
        for count in _GROUPS
    )


def _factor_scale(optimizer: KFAC, moments: int) -> float:
    """Bytes of the inverse in use over those of the averages."""
    found = None if optimizer.preconditioner is None else optimizer.preconditioner.inverse
    if found is None or not moments:
        return _INVERSE
    return _bytes(tensors_of(found.state_dict())) / moments


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _vectors(optimizer: KFAC) -> int:
    """Vectors as long as the parameters: gradient, last step, a proposal a candidate, a copy of the parameters.

    Where inputs have an unusual unit D^1/2, its inverse and a vector in it are known after the first step only.
    """
    every = getattr(optimizer.damping.config, "gamma_every", 1)
    proposals = max(len(optimizer.damping.candidates(step)) for step in (1, every))
    spare = 4 if optimizer.momentum.config.iterations > 1 else 0
    return 2 + proposals + spare + optimizer.trust.looks_back + optimizer.units.vectors
