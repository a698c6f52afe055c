"""Parameters whose rows are spread over processes, as FSDP2 (``fully_shard``) leaves them.

A whole tensor is made of the rows of all processes where its owner works on it, and its rows go back to where they
belong: one message out and one back, for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from kfacore.errors import ConfigError, UnsupportedModelError
from kfacore.parallel.ranks import Ranks

__all__ = ["Rows", "local", "plain_like", "require_same_processes", "require_shards"]


def _is_shard(tensor: Tensor) -> bool:
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, sharing its memory; of another one all of it."""
    if not _is_shard(tensor):
        return tensor.detach()
    found: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # of DTensor
    return found


def plain_like(parameter: Tensor) -> Tensor:
    """A tensor with a parameter's dtype and device, which is no shard: the parameter itself if it is none."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device) if _is_shard(parameter) else parameter


def require_shards(named: Mapping[str, nn.Parameter]) -> bool:
    """Whether parameters are spread over processes, by their first dimension on one line of processes.

    Args:
        named: Parameters by qualified name.

    Raises:
        UnsupportedModelError: They are spread otherwise, or some are and others are not; names the first.
    """
    spread = {name: p for name, p in named.items() if _is_shard(p)}
    if not spread:
        return False
    first: Any = next(iter(spread.values()))
    for name, parameter in named.items():
        if name not in spread:
            raise UnsupportedModelError(
                f"{name}: it is whole on every process while other parameters are sharded; give fully_shard the whole "
                "model, without ignored_params"
            )
        p: Any = parameter
        how = f"{name}: it is spread by {tuple(p.placements)} over a mesh of {p.device_mesh.ndim} dimension(s)"
        if p.device_mesh.ndim != 1:
            raise UnsupportedModelError(
                f"{how}; tensor parallelism, pipeline parallelism and hybrid sharding are not supported. Use "
                "fully_shard on a mesh of one dimension, or DistributedDataParallel"
            )
        if not (p.placements[0].is_shard() and p.placements[0].dim == 0):
            raise UnsupportedModelError(
                f"{how}; only rows may be spread, Shard(0), as fully_shard does by default. Tensor parallelism is not "
                "supported"
            )
        if p.device_mesh != first.device_mesh:
            raise UnsupportedModelError(
                f"{how}, which is another one than that of {next(iter(spread))}; shard all alike"
            )
    return True


def require_same_processes(parameter: nn.Parameter, ranks: Ranks) -> None:
    """Refuse an optimizer of other processes than those that a parameter is spread over.

    Raises:
        ConfigError: It is one.
    """
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.size() != ranks.size or mesh.get_local_rank() != ranks.rank:
        raise ConfigError(
            "process_group: the parameters are sharded over other processes than this optimizer works with; give it "
            "the group of their mesh, process_group=mesh.get_group()"
        )


class Rows:
    """Where the rows of parameters are, and the way to their owners and back.

    Args:
        parameters: Sharded ones.
        owners: The process that works on each.
        ranks: The processes, in the order of the mesh.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], owners: Sequence[int], ranks: Ranks) -> None:
        self._parameters, self._owners, self._ranks = list(parameters), list(owners), ranks
        counts = ranks.gather("shards", [len(local(p)) for p in parameters])
        self._counts = [[each[k] for each in counts] for k in range(len(parameters))]

    def range(self, k: int) -> slice:
        """Rows of parameter k that are here."""
        start = sum(self._counts[k][: self._ranks.rank])
        return slice(start, start + self._counts[k][self._ranks.rank])

    def gather(self, what: str, here: Sequence[Tensor]) -> dict[int, Tensor]:
        """Whole tensors, by the numbers of the parameters that this process owns.

        Args:
            what: For messages and the count of bytes.
            here: This process's rows of each.
        """
        size, rank = self._ranks.size, self._ranks.rank
        given = [[here[k].reshape(-1) for k in self._of(owner)] for owner in range(size)]
        arrived = self._swap(what, given, [self._entries(rank, source) for source in range(size)])
        rows = [iter(self._split(part, rank, source)) for source, part in enumerate(arrived)]
        return {k: torch.cat([next(each) for each in rows]) for k in self._of(rank)}

    def scatter(self, what: str, whole: Mapping[int, Tensor], like: Tensor) -> list[Tensor]:
        """This process's rows of all, from the whole tensors of their owners."""
        size, rank = self._ranks.size, self._ranks.rank
        mine = self._of(rank)
        parts = {k: torch.split(whole[k], self._counts[k]) for k in mine}
        given = [[parts[k][other].reshape(-1) for k in mine] for other in range(size)]
        given = [each or [like.new_empty(0)] for each in given]
        arrived = self._swap(what, given, [self._entries(owner, rank) for owner in range(size)])
        found: dict[int, Tensor] = {}
        for owner, part in enumerate(arrived):
            found |= dict(zip(self._of(owner), self._split(part, owner, rank), strict=True))
        return [found[k] for k in range(len(self._parameters))]

    def _of(self, owner: int) -> list[int]:
        return [k for k, who in enumerate(self._owners) if who == owner]

    def _entries(self, owner: int, rank: int) -> list[int]:
        """Numbers of one process's rows of each of an owner's parameters."""
        return [self._counts[k][rank] * math.prod(self._parameters[k].shape[1:]) for k in self._of(owner)]

    def _split(self, part: Tensor, owner: int, rank: int) -> list[Tensor]:
        pieces = torch.split(part, self._entries(owner, rank))
        shapes = [(self._counts[k][rank], *self._parameters[k].shape[1:]) for k in self._of(owner)]
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _swap(self, what: str, given: Sequence[Sequence[Tensor]], taken: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hand a vector to each process, and take one from each."""
        like = next(tensor for each in given for tensor in each)
        flat = [torch.cat(list(each)) if each else like.new_empty(0) for each in given]
        sizes = [sum(each) for each in taken]
        arrived = self._ranks.swap(what, torch.cat(flat), [len(each) for each in flat], sizes)
        return list(torch.split(arrived, sizes))
