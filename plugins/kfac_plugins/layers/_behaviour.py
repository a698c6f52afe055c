"""Whether a module of somebody else's computes what its name promises, found out by trying."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kfacore.host import full_precision

__all__ = ["computes"]


def computes(
    module: nn.Module,
    width: int,
    promised: Callable[[Tensor], Sequence[Tensor]],
) -> bool:
    """Whether the module's outputs on random inputs are one of those promised.

    Its forward must take one input and nothing else, and the module must hold nothing that a call could change. A
    small scale among the inputs tells where an epsilon is added. Hooks are not run, no generator is touched.

    Args:
        module: Called in its own dtype and on its device, without gradients.
        width: Last dimension of its input.
        promised: Outputs that would do, from an input of (3, width).
    """
    like = next(module.parameters())
    if like.is_meta or not like.is_floating_point() or any(True for _ in module.buffers()):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator) * torch.tensor([[1.0], [10.0], [1e-3]])
    x = x.to(like)
    with torch.no_grad(), full_precision():
        try:
            y = module.forward(x)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        return isinstance(y, Tensor) and any(_close(y, wanted) for wanted in promised(x))


def _close(y: Tensor, wanted: Tensor) -> bool:
    """Row by row, to what reduced precision inside the module leaves of the digits."""
    if y.shape != wanted.shape:
        return False
    tolerance = 30 * max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    error = (y.double() - wanted.double()).norm(dim=-1)
    return bool((error <= tolerance * wanted.double().norm(dim=-1)).all())
