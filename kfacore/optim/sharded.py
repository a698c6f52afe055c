"""A guest's directions for parameters in shards: what `kfacore.optim.grafting` does, with each process's rows alone.

Gradients, or their running means, of a block go to its owner row by row, are solved for there, and the rows of the
direction go back. Everything else is done on the rows that are here; lengths of blocks are sums over processes. So
what comes does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.curvature.owned import OwnedInverse
from kfacore.network.blocks import ModelBlock
from kfacore.optim.grafting import Grafting, movable
from kfacore.parallel.ranks import Ranks
from kfacore.parallel.shards import Rows, local, plain_like
from kfacore.roles.inverse import Inverse

__all__ = ["ShardedGrafting", "sharing_parameters"]


def sharing_parameters(layers: Sequence[ModelBlock]) -> list[tuple[int, int]]:
    """Pairs of blocks that lie in one parameter, which must have one owner."""
    first: dict[int, int] = {}
    pairs = []
    for i, block in enumerate(layers):
        for p in block.parameters:
            if first.setdefault(id(p), i) != i:
                pairs.append((first[id(p)], i))
    return pairs


class ShardedGrafting(Grafting):
    """Directions of K-FAC in the steps of an optimizer whose parameters are sharded.

    Args:
        base: The other optimizer.
        layers: The blocks.
        decoupled: As `Grafting` takes it.
        groups: The blocks that each process owns.
        ranks: The processes.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        layers: Sequence[ModelBlock],
        decoupled: bool | None,
        groups: Sequence[Sequence[int]],
        ranks: Ranks,
    ) -> None:
        self._base, self._layers, self._decoupled = base, list(layers), decoupled
        self._ranks, self._own = ranks, list(groups[ranks.rank])
        owner = {i: rank for rank, group in enumerate(groups) for i in group}
        of: dict[nn.Parameter, int] = {}
        for i, block in enumerate(self._layers):
            for p in block.parameters:
                of.setdefault(p, owner[i])
        self._all, self._like = list(of), plain_like(next(iter(of)))
        self._rows = Rows(self._all, list(of.values()), ranks)
        self._number = {p: k for k, p in enumerate(self._all)}
        self._tags = [self._tag(p, k) for k, p in enumerate(self._all)]

    def _tag(self, p: nn.Parameter, k: int) -> Tensor:
        """Which block each entry of the rows here is of: one number where it is the same for all, -1 for none."""
        whole = torch.full(p.shape, -1, dtype=torch.int32)
        other = torch.empty(0)
        for i, block in enumerate(self._layers):
            if any(each is p for each in block.parameters):
                blank = {id(q): other.new_empty(1).expand(q.shape) for q in block.parameters if q is not p}
                for view in block.view(lambda q, blank=blank: whole if q is p else blank[id(q)]):  # type: ignore[misc]
                    if view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                        view.fill_(i)
        first = whole.reshape(-1)[:1]
        found = first.clone() if bool((whole == first).all()) else whole[self._rows.range(k)].contiguous()
        return found.to(self._like.device)

    def graft(self, inverse: Inverse) -> None:
        """The base's step with the directions of K-FAC."""
        if not self._moving():
            self._base.step()
            return
        groups, moving = self._groups(), self._moving_parameters()
        start = [local(p).clone() for p in self._all]
        self._base.step()
        source = []
        for p, kept in zip(self._all, start, strict=True):
            group = groups[id(p)]
            decay = self._decay(group)
            if isinstance(decay, Tensor) or decay:
                kept.mul_(1.0 - decay)
            source.append(self._source_here(p, group, kept) if p in moving else torch.zeros_like(kept))
        directions = self._solve_rows(inverse, source)
        steps = [local(p) - kept for p, kept in zip(self._all, start, strict=True)]
        ratio = self._lengths_of(steps) / self._lengths_of(directions)
        weight = torch.where(torch.isfinite(ratio), -ratio, torch.nan).to(self._like.dtype)
        for k, (p, kept) in enumerate(zip(self._all, start, strict=True)):
            if p in moving:
                own = self._entrywise(weight, k)
                local(p).copy_(kept + torch.where(own.isnan(), steps[k], own * directions[k]))

    def replace_rows(self, inverse: Inverse, kappa: float | None) -> None:
        """The base's step on preconditioned gradients, shortened to a trust region if kappa is given."""
        if not self._moving():
            self._base.step()
            return
        groups, moving = self._groups(), self._moving_parameters()
        own: dict[nn.Parameter, Any] = {p: p.grad for p in self._all if p in moving}
        source = [local(own[p]) if p in moving else torch.zeros_like(local(p)) for p in self._all]
        directions = self._solve_rows(inverse, source)
        fine = torch.where(torch.isfinite(self._lengths_of(directions)), 1.0, torch.nan).to(self._like.dtype)
        total = torch.zeros((), dtype=torch.float64, device=self._like.device)
        for k, p in enumerate(self._all):
            some = self._entrywise(fine, k)
            directions[k] = torch.where(some.isnan(), source[k], directions[k])
            total += groups[id(p)]["lr"] ** 2 * (directions[k] * source[k]).sum(dtype=torch.float64)
        if kappa is not None:
            (total,) = self._ranks.sum("trust region", [total])
            nu = torch.where(total > 0, (kappa / total).sqrt().clamp_max(1.0), torch.ones_like(total))
            directions = [d * nu.to(d.dtype) for d in directions]
        try:
            for p, g in own.items():
                p.grad = torch.empty_like(g)
                local(p.grad).copy_(directions[self._number[p]])
            self._base.step()
        finally:
            for p, g in own.items():
                p.grad = g

    def _moving_parameters(self) -> set[nn.Parameter]:
        return {p for i in self._moving() for p in self._layers[i].parameters}

    def _source_here(self, p: nn.Parameter, group: dict[str, Any], kept: Tensor) -> Tensor:
        """The rows here of what the base goes down along, with decay that it adds to gradients."""
        found = local(self._source_of(p, group)).clone()
        decay = group.get("weight_decay")
        if decay and not self._is_decoupled(group) and (self._mean(p) is None or group.get("nesterov")):
            found.add_(kept, alpha=decay)
        return found

    def _solve_rows(self, inverse: Inverse, source: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 of what is given in rows, in rows."""
        assert isinstance(inverse, OwnedInverse)
        whole = self._rows.gather("gradient rows", source)
        with self._ranks.together("solve"):
            blocks: list[Any] = [None] * len(self._layers)
            out: list[Any] = [None] * len(self._layers)
            for i in self._own:
                block = self._layers[i]
                blocks[i], out[i] = (self._like.new_zeros(block.info.shape) for _ in range(2))
                if movable(block):
                    parts = zip(block.split(blocks[i]), block.view(lambda p: whole[self._number[p]]), strict=True)
                    for part, view in parts:
                        part.copy_(view)
            inverse.own.solve_into(blocks, out)
            for i in self._own:
                block = self._layers[i]
                parts = zip(block.view(lambda p: whole[self._number[p]]), block.split(out[i]), strict=True)
                for view, part in parts:
                    view.copy_(part)
        return self._rows.scatter("direction rows", whole, self._like)

    def _lengths_of(self, here: Sequence[Tensor]) -> Tensor:  # (blocks,) float64
        """Length of each block of what all processes have."""
        total = torch.zeros(len(self._layers) + 1, dtype=torch.float64, device=self._like.device)
        for k, tensor in enumerate(here):
            squares, tag = tensor.double().square(), self._tags[k].long() + 1
            if tag.numel() == 1:
                total[tag] += squares.sum()
            else:
                total.index_add_(0, tag.reshape(-1), squares.reshape(-1))
        (found,) = self._ranks.sum("lengths", [total])
        return found[1:].sqrt()

    def _entrywise(self, numbers: Tensor, k: int) -> Tensor:
        """A number of each block at the entries of parameter k, NaN where they are of none."""
        padded = torch.cat([numbers.new_full((1,), torch.nan), numbers])
        return padded[self._tags[k].long() + 1]
