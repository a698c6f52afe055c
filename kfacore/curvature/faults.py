"""What a component did wrong while it ran, said with its name and the block: nobody else knows whose code it was."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import KfacError, NumericalError, PluginError
from kfacore.registry import get_registry
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment

__all__ = ["blaming", "component", "examine", "named"]

_OWN = ("kfacore", "kfac_plugins")


def component(part: Any, slot: str = "approx") -> str:
    """How users know it, where it is written, and which distribution and version brought it, if one did."""
    kind = type(part)
    where = f"{kind.__module__}.{kind.__qualname__}"
    registry = get_registry()
    for found in registry.components(slot):
        if found.target == f"{kind.__module__}:{kind.__qualname__}":
            origin = registry.origin(found)
            where += f", {origin.distribution} {origin.version}" if origin.distribution else ""
    name = getattr(getattr(part, "config", None), "kind", None)
    return f"{slot} '{name}' ({where})" if name else f"{slot} {where}"


@contextmanager
def blaming(parts: Callable[[], Iterable[tuple[str, Any]]], doing: str) -> Iterator[None]:
    """Turn an exception out of somebody's component into an error that names it; of ours it stays what it is.

    Args:
        parts: Told what may have raised it, slot by slot; asked only if something did.
        doing: What was going on, for example ``"step 3"``.

    Raises:
        PluginError: A component raised something that is no error of kfacore; lack of memory stays what it is.
    """
    try:
        yield
    except (KfacError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for frame in reversed(frames):
            for slot, part in parts():
                if not _belongs(frame, part):
                    continue
                block = next((value.name for value in frame.f_locals.values() if isinstance(value, Block)), "")
                where = f"{frame.f_code.co_name}, {f'block {block}, ' if block else ''}{doing}"
                said = f"{type(error).__name__}: {error}"
                raise PluginError(f"{component(part, slot)} failed ({where}): {said}") from error
        raise


def _belongs(frame: FrameType, part: Any) -> bool:
    """Whether the frame runs a method of this object, or of what this approximation made, that is not ours."""
    kind, owner = type(part), frame.f_locals.get("self")
    if isinstance(part, Approximation) and isinstance(owner, Inverse | Factorisation | Moment):
        return not _ours(type(owner))
    code = frame.f_code.co_qualname.startswith(f"{kind.__qualname__}.")
    return not _ours(kind) and (owner is part or (code and frame.f_globals.get("__name__") == kind.__module__))


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _OWN


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
