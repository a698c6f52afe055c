"""Torch's own functions, called without loading torch's compiler. Imports no torch.

Torch keeps its compiler out of some functions by a wrapper that imports the compiler when it is first called: a
thousand modules and as much time as torch itself takes, in every process that makes an optimizer. While nobody has
imported it nothing is compiled, and the function in the wrapper (``__wrapped__``, as `functools.wraps` leaves it) does
the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

__all__ = ["uncompiled", "uncompiled_mode"]

_COMPILER = "torch._dynamo"

Mode = TypeVar("Mode")


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch, so that calling it loads no compiler.

    Args:
        function: As torch has it, with or without the wrapper.

    Returns:
        The function in the wrapper while no compiler is loaded, else what was given.
    """
    return function if _COMPILER in sys.modules else _inner(function)


def uncompiled_mode(mode: Mode) -> Mode:
    """A new `TorchDispatchMode`, whose ``__torch_dispatch__`` torch wraps in the same way.

    Args:
        mode: Of a class without ``__slots__``; it becomes one of a subclass while no compiler is loaded.

    Returns:
        The mode.
    """
    if _COMPILER not in sys.modules:
        kind: Any = type(mode)
        mode.__class__ = _bare(kind)
    return mode


@cache
def _bare(mode: Any) -> Any:
    """A subclass with the function in the wrapper: torch wraps what a class body has, and takes what is set later."""
    bare = type(mode.__name__, (mode,), {"__module__": mode.__module__, "__doc__": mode.__doc__})
    function = mode.__torch_dispatch__
    bare.__torch_dispatch__ = _inner(function)  # type: ignore[attr-defined]
    return bare


def _inner(function: Any) -> Any:
    """What is in torch's wrapper, and only in that one: others have put theirs on for a reason."""
    own = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    return getattr(function, "__wrapped__", function) if own else function
