r"""How large each block's curvature is in the mean: what a damping that fits every block is measured with.

    scale_i = sqrt(tr F_i / P_i),      for a Kronecker product tr F_i / P_i = (tr A_i / d_in) (tr G_i / d_out),

so that gamma_i = c scale_i adds c times its own mean to each factor of a block whose gamma is split by its own pi.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kfacore.roles.block import Block
from kfacore.roles.moment import Moment, Number, Tally, divisor_of
from kfacore.roles.samples import LayerSamples, Samples

__all__ = ["MeanScales", "gammas"]


class MeanScales(Moment):
    """Mean diagonal entries of A, then of G, (): one each a block; of what is no product 1 and that of F."""

    kinds: ClassVar[tuple[str, ...]] = ("kron", "full", "diagonal", "tied")

    @classmethod
    def serves(cls, block: Block) -> bool:
        """Blocks of every kind."""
        return block.kind in cls.kinds

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """Two scalars a block."""
        return [()] * (2 * len(layers))

    def tallies(self, samples: Samples) -> list[Tally]:
        """Rows for A, S for G."""
        total = divisor_of(samples)
        rows: list[Number] = [0 if s is None else _use(s).rows for s in samples]
        return [*(Tally(count, count) for count in rows), *(Tally(total, count) for count in rows)]

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """Sums of squares."""
        for i, (block, found) in enumerate(zip(self.layers, samples, strict=True)):
            if found is None:
                continue
            s, g = _use(found), len(self.layers) + i
            product = block.kind in ("kron", "tied")
            outputs = block.groups * (block.d_out if product else block.d_in)
            if found.head is not None and s is not found.head:
                outputs = block.d_in  # the embedding's g has its width
            _blend(values[i], _inputs(block, s), beta[i], alpha[i])
            _blend(values[g], s.gradients.square().sum() / outputs, beta[g], alpha[g])


def _use(s: LayerSamples) -> LayerSamples:
    """Of a weight used as embedding and head the head's samples, unless it was not used."""
    return s if s.head is None or s.head.gradients.shape[1] == 0 else s.head


def _inputs(block: Block, s: LayerSamples) -> Tensor:
    """Sum over rows of the mean square of abar's entries."""
    if s.inputs.numel() == 0:
        return torch.as_tensor(s.rows, dtype=s.gradients.dtype, device=s.gradients.device)
    if s.inputs.dim() == 1:
        words = block.d_out if block.kind == "tied" else block.d_in
        return (s.inputs >= 0).sum().to(s.gradients.dtype) / words
    return s.inputs.square().sum() / s.inputs[0].numel()


def _blend(value: Tensor, new: Tensor, beta: float, alpha: float) -> None:
    new = new.to(value.dtype) * alpha
    value.copy_(new if beta == 0.0 else value * beta + new)


def gammas(values: Sequence[Tensor], share: float) -> Tensor:  # (blocks,) float64
    """Gamma of each block, a share of its mean scale; that of the others' mean where a block has none yet.

    Args:
        values: Those of `MeanScales`.
        share: c, above 0.
    """
    a, g = torch.stack(list(values)).double().view(2, -1).unbind()
    scale = (a * g).sqrt()
    alive = torch.isfinite(scale) & (scale > 0)
    logs = torch.where(alive, scale, 1.0).log()
    mean = (logs.sum() / alive.sum().clamp_min(1)).exp()
    return share * torch.where(alive, scale, mean)
