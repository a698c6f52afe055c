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

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.network import BlockVector
from kfacore.network.blocks import ModelBlock
from kfacore.roles.inverse import Inverse

__all__ = ["Grafting", "movable"]

_FIRST_MOMENT = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
"""Those that keep a mean of gradients as ``exp_avg``."""


def movable(block: ModelBlock) -> bool:
    """Whether all of a block's parameters are trainable and have a dense gradient; others are left alone."""
    return all(p.requires_grad and p.grad is not None and not p.grad.is_sparse for p in block.parameters)


class Grafting:
    """Directions of K-FAC in the steps of another optimizer.

    Args:
        base: The other optimizer.
        layers: The blocks.
        decoupled: Whether weight decay is no part of gradients; None asks each group, see `_decay`.
    """

    def __init__(self, base: torch.optim.Optimizer, layers: Sequence[ModelBlock], decoupled: bool | None) -> None:
        self._base, self._layers, self._decoupled = base, list(layers), decoupled
        self._source, self._solved = BlockVector.zeros(layers), BlockVector.zeros(layers)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def graft(self, inverse: Inverse) -> None:
        """The base's step with the directions of K-FAC."""
        blocks, groups = self._moving(), self._groups()
        parameters = _parameters(blocks)
        before = {p: p.detach().clone() for p in parameters}
        self._base.step()
        kept = {p: _decayed(before[p], self._decay(groups[id(p)])) for p in parameters}
        steps = {p: p.detach() - kept[p] for p in parameters}
        sources = {p: self._source_of(p, before[p], groups[id(p)]) for p in parameters}
        directions = self._solve(blocks, sources, inverse)
        moved = [block.view(lambda p: steps[p]) for block in blocks]
        ratio = (self._squares(moved) / self._squares(directions)).sqrt()
        fine = torch.isfinite(ratio)
        for i, block in enumerate(blocks):
            views, starts = block.views(), block.view(lambda p: kept[p])
            for view, start, d, s in zip(views, starts, directions[i], moved[i], strict=True):
                view.copy_(start + torch.where(fine[i], -ratio[i] * d, s))

    def replace(self, inverse: Inverse, kappa: float | None) -> None:
        """The base's step on preconditioned gradients, shortened to a trust region if kappa is given."""
        blocks, groups = self._moving(), self._groups()
        own: dict[nn.Parameter, Tensor] = {p: p.grad for p in _parameters(blocks)}  # type: ignore[misc]  # movable
        directions = self._solve(blocks, own, inverse)
        new = {p: g.clone() for p, g in own.items()}
        finite = torch.isfinite(self._squares(directions)) if blocks else torch.empty(0)
        for i, block in enumerate(blocks):
            for target, d in zip(block.view(lambda p: new[p]), directions[i], strict=True):
                target.copy_(torch.where(finite[i], d, target))
        if kappa is not None and new:
            nu = _nu(new, own, {p: groups[id(p)]["lr"] for p in new}, kappa)
            torch._foreach_mul_(list(new.values()), nu.to(next(iter(new.values())).dtype))
        try:
            for p, g in new.items():
                p.grad = g
            self._base.step()
        finally:
            for p, g in own.items():
                p.grad = g

    def _moving(self) -> list[ModelBlock]:
        return [block for block in self._layers if movable(block)]

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self._base.param_groups for p in group["params"]}

    def _solve(
        self, blocks: Sequence[ModelBlock], values: Mapping[nn.Parameter, Tensor], inverse: Inverse
    ) -> list[list[Tensor]]:
        """F-hat^-1 of what stands for the parameters, in parts a block; other blocks count as zero."""
        chosen = {id(block) for block in blocks}
        for block, matrix in zip(self._layers, self._source.blocks, strict=True):
            if id(block) not in chosen:
                matrix.zero_()
                continue
            for part, share in zip(block.split(matrix), block.view(lambda p: values[p]), strict=True):
                part.copy_(share)
        inverse.solve_into(self._source.blocks, self._solved.blocks)
        pairs = zip(self._layers, self._solved.blocks, strict=True)
        return [block.split(matrix) for block, matrix in pairs if id(block) in chosen]

    def _squares(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:  # (blocks,)
        """Squared length of each block."""
        flat = [part for own in parts for part in own]
        if not flat:
            return torch.empty(0)
        squares = nn.functional.pad(torch.stack(torch._foreach_norm(flat)).square(), (0, 1))
        return squares[self._places_of(tuple(map(len, parts)), squares.device)].sum(1)

    def _places_of(self, counts: tuple[int, ...], device: torch.device) -> Tensor:  # (blocks, most parts)
        """Where the parts of each block stand among all, the place behind them for parts that it has not.

        Kept, because a list from the host is a copy that a GPU has to be waited for; and not added up by index, which
        a GPU does in no fixed order.
        """
        if counts not in self._places:
            ends, total = list(accumulate(counts)), sum(counts)
            rows = [
                [*range(end - count, end), *[total] * (max(counts) - count)]
                for end, count in zip(ends, counts, strict=True)
            ]
            self._places[counts] = torch.tensor(rows, device=device)
        return self._places[counts]

    def _is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether decay is no part of gradients: Adam and its kin say it, AdamW is known, others are asked for."""
        if self._decoupled is not None:
            return self._decoupled
        return bool(group.get("decoupled_weight_decay", isinstance(self._base, torch.optim.AdamW)))

    def _decay(self, group: Mapping[str, Any]) -> float | Tensor:
        """eta lambda of decoupled decay, 0 where there is none."""
        decay = group.get("weight_decay")
        return group["lr"] * decay if decay and self._is_decoupled(group) else 0.0

    def _source_of(self, p: nn.Parameter, before: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What is preconditioned: what the base goes down along, apart from its own scaling."""
        state = self._base.state.get(p, {})
        if isinstance(self._base, _FIRST_MOMENT) and "exp_avg" in state:
            mean: Tensor = state["exp_avg"]
            return mean
        assert p.grad is not None
        g = -p.grad if group.get("maximize") else p.grad
        decay = group.get("weight_decay")
        if decay and not self._is_decoupled(group):
            g = g + decay * before
        if isinstance(self._base, torch.optim.SGD) and state.get("momentum_buffer") is not None:
            buffer: Tensor = state["momentum_buffer"]
            return g + group["momentum"] * buffer if group.get("nesterov") else buffer
        return g


def _parameters(blocks: Sequence[ModelBlock]) -> list[nn.Parameter]:
    return list({id(p): p for block in blocks for p in block.parameters}.values())


def _decayed(value: Tensor, decay: float | Tensor) -> Tensor:
    return value * (1.0 - decay) if isinstance(decay, Tensor) or decay else value


def _nu(
    new: Mapping[nn.Parameter, Tensor],
    own: Mapping[nn.Parameter, Tensor],
    rates: Mapping[nn.Parameter, Any],
    kappa: float,
) -> Tensor:
    """min(1, sqrt(kappa / sum of eta^2 d . g)); 1 where the sum is not positive."""
    terms = [rates[p] ** 2 * (d * own[p]).sum(dtype=torch.float64) for p, d in new.items()]
    total = torch.stack([torch.as_tensor(term) for term in terms]).sum()
    return torch.where(total > 0, (kappa / total).sqrt().clamp_max(1.0), torch.ones_like(total))
