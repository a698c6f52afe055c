r"""How a guest's direction d = F-hat^-1 g becomes a step of the optimizer that it is a guest of.

``graft``: the base optimizer takes its own step on the true gradients. Then, a block,

    theta <- theta_0 - eta lambda theta_0 [decoupled decay alone] - |s| d / |d|,

where s is the base's step without its decoupled decay, and d = F-hat^-1 m for the base's own running mean m of
gradients where it keeps one (Adam's first moment, SGD's momentum buffer), else F-hat^-1 g. Decay that the base adds to
gradients is in m, or is added to g. So learning rates, schedules, warm-up, clipping and decay mean what they meant.

``kl``: gradients are replaced by nu d, nu = min(1, sqrt(kappa / sum over parameters of eta^2 d . g)), and the base
steps with them; ``none``: by d. The true gradients are put back afterwards. A block whose d is not finite is left to
the base.

Source: grafting, Agarwal et al. 2020; nu, Ba, Grosse & Martens 2017, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.network import BlockVector
from kfacore.network.blocks import ModelBlock, Of

__all__ = ["Grafting", "movable"]

Solve = Callable[[Sequence[Tensor], Sequence[Tensor]], None]

_FIRST_MOMENT = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
"""Those that keep a mean of gradients as ``exp_avg``."""

_DECOUPLED: tuple[type, ...] = tuple(
    getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name)
)
"""Those that multiply parameters by 1 - eta lambda and do not say so in their groups; Muon is there since torch 2.9."""


def movable(block: ModelBlock) -> bool:
    """Whether all of a block's parameters are trainable and have a dense gradient; others are left alone."""
    return all(p.requires_grad and p.grad is not None and not p.grad.is_sparse for p in block.parameters)


class Grafting:
    """Directions of K-FAC in the steps of another optimizer.

    All is done on three vectors that hold every block, in a few calls for all of them, and nothing is read on the host.

    Args:
        base: The other optimizer.
        layers: The blocks.
        decoupled: Whether weight decay is no part of gradients; None asks each group, see `_decay`.

    Attributes:
        failed: Blocks whose solution was not finite although what it was solved for is, (blocks,) bool, on the device.
    """

    def __init__(self, base: torch.optim.Optimizer, layers: Sequence[ModelBlock], decoupled: bool | None) -> None:
        self._base, self._layers, self._decoupled = base, list(layers), decoupled
        self._kept, self._source, self._solved = (BlockVector.zeros(layers) for _ in range(3))
        self._owners = [_owners(block) for block in layers]
        self.failed = torch.zeros(len(self._layers), dtype=torch.bool, device=self._kept.flat.device)

    def step(self) -> list[int]:
        """The base's own step, whose start is kept.

        Returns:
            The blocks that move.
        """
        moving = self._moving()
        if moving:
            torch._foreach_copy_(self._parts(self._kept, moving), self._views(moving, lambda p: p.detach()))
        self._base.step()
        return moving

    def turn(self, moving: Sequence[int], solve: Solve) -> None:
        """Give the step that was just taken the directions of K-FAC.

        Args:
            moving: What `step` returned.
            solve: Writes F-hat^-1 v over its second argument.
        """
        if not moving:
            return
        groups = self._groups()
        owners = [p for i in moving for p in self._owners[i]]
        views = self._views(moving, lambda p: p.detach())
        kept = self._parts(self._kept, moving)
        for group, chosen in _by_group(owners, groups):
            decay = self._decay(group)
            if isinstance(decay, Tensor) or decay:
                torch._foreach_mul_([kept[i] for i in chosen], 1.0 - decay)
        self._fill(moving, lambda p: self._source_of(p, groups[id(p)]))
        self._add_decay(moving, owners, groups)
        solved = self._solve(solve)
        step = self._source  # what it was solved for is not needed any more
        torch._foreach_copy_(self._parts(step, moving), views)
        step.flat.sub_(self._kept.flat)
        ratio = _lengths(step) / solved
        fine = torch.isfinite(ratio)
        self._choose(torch.where(fine, -ratio, 0.0), fine, step)
        self._solved.flat.add_(self._kept.flat)
        torch._foreach_copy_(views, self._parts(self._solved, moving))

    def replace(self, solve: Solve, kappa: float | None) -> None:
        """The base's step on preconditioned gradients, shortened to a trust region if kappa is given.

        Args:
            solve: Writes F-hat^-1 v over its second argument.
            kappa: Twice the most that the step may change the model's predictions.
        """
        moving, groups = self._moving(), self._groups()
        if not moving:
            self._base.step()
            return
        owners = [p for i in moving for p in self._owners[i]]
        own: dict[nn.Parameter, Tensor] = {p: p.grad for p in owners}  # type: ignore[misc]  # movable
        new = {p: torch.empty_like(g) for p, g in own.items()}
        torch._foreach_copy_(list(new.values()), list(own.values()))
        self._fill(moving, lambda p: own[p])
        fine = torch.isfinite(self._solve(solve))
        self._kept.flat.copy_(self._source.flat)
        self._choose(fine.to(self._solved.flat.dtype), fine, self._source)
        parts = self._parts(self._solved, moving)
        if kappa is not None:
            gradient = self._parts(self._kept, moving)
            for group, chosen in _by_group(owners, groups):
                torch._foreach_mul_([gradient[i] for i in chosen], group["lr"] ** 2)
            torch._foreach_mul_(parts, _nu(self._solved.flat, self._kept.flat, kappa))
        torch._foreach_copy_(self._views(moving, lambda p: new[p]), parts)
        try:
            for p, g in new.items():
                p.grad = g
            self._base.step()
        finally:
            for p, g in own.items():
                p.grad = g

    def _solve(self, solve: Solve) -> Tensor:  # (blocks,)
        """Solve for the source; the length of each block's solution."""
        solve(self._source.blocks, self._solved.blocks)
        lengths = _lengths(self._solved)
        self.failed |= torch.isfinite(_lengths(self._source)) & ~torch.isfinite(lengths)
        return lengths

    def _moving(self) -> list[int]:
        return [i for i, block in enumerate(self._layers) if movable(block)]

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self._base.param_groups for p in group["params"]}

    def _views(self, moving: Sequence[int], of: Of) -> list[Tensor]:
        """What stands for the parameters, in the shapes of `_parts`."""
        return [view for i in moving for view in self._layers[i].view(of)]

    def _parts(self, vector: BlockVector, moving: Sequence[int]) -> list[Tensor]:
        """Views of the vector, aligned with those of the parameters."""
        return [part for i in moving for part in self._layers[i].split(vector.blocks[i])]

    def _fill(self, moving: Sequence[int], of: Of) -> None:
        """What is to be preconditioned; blocks that do not move count as zero."""
        if len(moving) < len(self._layers):
            for vector in (self._kept, self._source, self._solved):
                for i in set(range(len(self._layers))) - set(moving):
                    vector.blocks[i].zero_()
        torch._foreach_copy_(self._parts(self._source, moving), self._views(moving, of))

    def _choose(self, weights: Tensor, fine: Tensor, other: BlockVector) -> None:
        """Each block's solution times its weight where that is fine, else that of the other vector, which is lost."""
        self._solved.flat.nan_to_num_(0.0, 0.0, 0.0)  # 0 times NaN is not 0
        torch._foreach_mul_(self._solved.blocks, list(weights.unbind()))
        torch._foreach_mul_(other.blocks, list((~fine).to(weights.dtype).unbind()))
        self._solved.flat.add_(other.flat)

    def _is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether decay is no part of gradients: Adam and its kin say it, some are known, others are asked for."""
        if self._decoupled is not None:
            return self._decoupled
        return bool(group.get("decoupled_weight_decay", isinstance(self._base, _DECOUPLED)))

    def _decay(self, group: Mapping[str, Any]) -> float | Tensor:
        """eta lambda of decoupled decay, 0 where there is none."""
        decay = group.get("weight_decay")
        return group["lr"] * decay if decay and self._is_decoupled(group) else 0.0

    def _mean(self, p: nn.Parameter) -> Tensor | None:
        """The base's own running mean of gradients, where it keeps one."""
        state = self._base.state.get(p, {})
        found = "exp_avg" if isinstance(self._base, _FIRST_MOMENT) else None
        found = "momentum_buffer" if isinstance(self._base, torch.optim.SGD) else found
        mean: Tensor | None = None if found is None else state.get(found)
        return mean

    def _source_of(self, p: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """What the base goes down along, apart from its own scaling and from decay that is in no mean."""
        mean = self._mean(p)
        if mean is not None and not group.get("nesterov"):
            return mean
        assert p.grad is not None
        g = -p.grad if group.get("maximize") else p.grad
        return g if mean is None else g + group["momentum"] * mean

    def _add_decay(
        self, moving: Sequence[int], owners: Sequence[nn.Parameter], groups: Mapping[int, dict[str, Any]]
    ) -> None:
        """Decay that the base adds to gradients, unless it is in a mean already."""
        for group, chosen in _by_group(owners, groups):
            decay = group.get("weight_decay")
            if not decay or self._is_decoupled(group):
                continue
            own = [i for i in chosen if self._mean(owners[i]) is None or group.get("nesterov")]
            if own:
                source, start = self._parts(self._source, moving), self._parts(self._kept, moving)
                torch._foreach_add_([source[i] for i in own], [start[i] for i in own], alpha=decay)


def _owners(block: ModelBlock) -> list[nn.Parameter]:
    """The parameter that each of a block's views is of, told by where views of other tensors come from."""
    tags = {p: torch.zeros(()).expand(p.shape) for p in block.parameters}
    found = {tag.untyped_storage().data_ptr(): p for p, tag in tags.items()}
    return [found[view.untyped_storage().data_ptr()] for view in block.view(lambda p: tags[p])]


def _by_group(
    owners: Sequence[nn.Parameter], groups: Mapping[int, dict[str, Any]]
) -> list[tuple[dict[str, Any], list[int]]]:
    """Groups with the positions that they have in the list."""
    found: dict[int, tuple[dict[str, Any], list[int]]] = {}
    for i, p in enumerate(owners):
        group = groups[id(p)]
        found.setdefault(id(group), (group, []))[1].append(i)
    return list(found.values())


def _lengths(vector: BlockVector) -> Tensor:  # (blocks,)
    """Length of each block."""
    return torch.stack(torch._foreach_norm(vector.blocks))


def _nu(direction: Tensor, gradient: Tensor, kappa: float) -> Tensor:
    """min(1, sqrt(kappa / sum of eta^2 d . g)) for a gradient times eta^2; 1 where the sum is not positive."""
    total = (direction * gradient).sum(dtype=torch.float64)
    nu = torch.where(total > 0, (kappa / total).sqrt().clamp_max(1.0), torch.ones_like(total))
    return nu.to(direction.dtype)
