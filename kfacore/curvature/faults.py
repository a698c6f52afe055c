"""What a component did wrong while it ran, said with its name and the block: nobody else knows whose code it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kfacore.errors import KfacError, NumericalError, PluginError
from kfacore.registry import get_registry
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block

__all__ = ["component", "examine", "named"]


def component(approx: Approximation) -> str:
    """How users know it, where it is written, and which distribution and version brought it, if one did."""
    kind = type(approx)
    where = f"{kind.__module__}.{kind.__qualname__}"
    registry = get_registry()
    for found in registry.components("approx"):
        if found.target == f"{kind.__module__}:{kind.__qualname__}":
            origin = registry.origin(found)
            where += f", {origin.distribution} {origin.version}" if origin.distribution else ""
    return f"approx '{approx.config.kind}' ({where})"


@contextmanager
def named(approx: Approximation, blocks: Sequence[Block], doing: str) -> Iterator[None]:
    """Turn an exception that says nothing of its origin into an error that names the component and its blocks.

    Args:
        approx: Whose code runs.
        blocks: The blocks that it serves.
        doing: What it was asked for, for example ``"factorise"``.

    Raises:
        PluginError: It raised something that is no error of kfacore; lack of memory stays what it is.
    """
    try:
        yield
    except (KfacError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        names = ", ".join(block.name for block in blocks[:3]) + (", ..." if len(blocks) > 3 else "")
        raise PluginError(
            f"{component(approx)}: {doing} failed on the blocks {names}: {type(error).__name__}: {error}"
        ) from error


def examine(makers: Sequence[str], blocks: Sequence[Block], solved: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Check what an inverse made of ``like``: one tensor a block, of its shape and dtype, finite. Waits for the device.

    Args:
        makers: Who serves each block.
        blocks: The blocks.
        solved: What came of it.
        like: What was solved for.

    Raises:
        PluginError: Number, shape or dtype is wrong; names the component and the block.
        NumericalError: A block is not finite although its gradient is; likewise.
    """
    if len(solved) != len(like):
        raise PluginError(f"{makers[0]}: solve returned {len(solved)} tensors for {len(like)} blocks")
    for maker, block, found, wanted in zip(makers, blocks, solved, like, strict=True):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise PluginError(
                f"{maker}: solve returned {tuple(found.shape)}, {found.dtype} for the block {block.name}, which is "
                f"{tuple(wanted.shape)}, {wanted.dtype}"
            )
    finite = [torch.isfinite(x).all() | ~torch.isfinite(v).all() for x, v in zip(solved, like, strict=True)]
    for maker, block, good in zip(makers, blocks, torch.stack(finite).tolist(), strict=True):
        if not good:
            raise NumericalError(
                f"{block.name}: {maker} made NaN or infinity of a finite gradient; raise the damping "
                "(damping.lambda0, or gamma_min), or report it to its author"
            )
