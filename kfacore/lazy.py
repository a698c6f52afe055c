"""Public names of a package that are loaded on first use, so that importing the package stays light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package takes as ``__getattr__`` and ``__dir__`` (PEP 562).

    Args:
        package: Its ``__name__``.
        homes: Names by the module below it that has them, ``{"optim.kfac": ("KFAC",)}``.

    Returns:
        The two functions; `dir` shows every name, loaded or not.
    """
    modules = {name: f"{package}.{home}" for home, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names
