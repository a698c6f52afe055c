r"""The layer type of `kfac_lowrank.module.LowRank`: two linear maps, each a Kronecker block.

    c = D x             block ``down``:  rows x,       output gradients by c
    y = U c + b         block ``up``:    rows [c; 1],  output gradients by y

kfacore sees a module's inputs and outputs, but not c, so `LowRankLayer.forward` computes the same as the module and
tells of both uses. A frozen parameter is left out: a frozen bias is a constant, a map whose weight is frozen no block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from kfacore.roles import Block, Emit, Layer, Use
from torch import Tensor, nn
from torch.nn.functional import pad

from kfac_lowrank import LowRankConfig
from kfac_lowrank.module import LowRank

__all__ = ["LowRankLayer"]


class LowRankLayer(Layer):
    """Blocks ``down`` and ``up``."""

    Config: ClassVar[type[LowRankConfig]] = LowRankConfig
    config: LowRankConfig

    def matches(self, module: nn.Module) -> bool:
        """Ours, but no subclass that computes something else."""
        return isinstance(module, LowRank) and type(module).forward is LowRank.forward

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """Those of ``down`` and ``up`` whose weight is trained."""
        trained = {local for local, p in module.named_parameters() if p.requires_grad}
        prefix = f"{name}." if name else ""
        blocks = []
        for part in ("down", "up"):
            if part not in trained:
                continue
            d_out, d_in = module.get_parameter(part).shape
            bias = part == "up" and "bias" in trained
            params = tuple(prefix + local for local in ((part, "bias") if bias else (part,)))
            blocks.append(Block(prefix + part, d_in + bias, d_out, bias, params=params))
        return blocks

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """[D], [U] or [U, b]."""
        return [tensors[_local(name)] for name in block.params]

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """All columns, or all but the last and the last."""
        return [matrix[:, :-1], matrix[:, -1]] if block.bias else [matrix]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """What went in, x or [c; 1], of every position."""
        x = _positions(use.inputs)
        return pad(x, (0, 1), value=1.0) if block.bias else x

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """The derivative by what came out, of every position."""
        return _positions(g)

    def forward(self, module: nn.Module, emit: Emit) -> Callable[[Tensor], Tensor]:
        """As the module's own. Parameters are read in every call, because others may stand in for them."""
        parts = {_local(block.name) for block in self.blocks("", module)}

        def forward(x: Tensor) -> Tensor:
            assert isinstance(module, LowRank)
            c = x @ module.down.T
            y = c @ module.up.T + module.bias
            for part, inputs, output in (("down", x, c), ("up", c, y)):
                if part in parts:
                    emit(Use(part, inputs.detach(), output, {}))
            return y

        return forward


def _local(name: str) -> str:
    """What follows the last dot."""
    return name.rpartition(".")[2]


def _positions(
    x: Tensor,  # (n, ..., d)
) -> Tensor:  # (n, R, d)
    """All dimensions between the case and the last as one."""
    return x.reshape(len(x), -1, x.shape[-1])
