"""The errors of kfacore: each says what was found, where, and what to do.

Every error that a user can cause derives from `KfacError`; the command prints its message without a traceback and
exits with its ``exit_code``.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "KfacError",
    "NumericalError",
    "PluginError",
    "RankError",
    "ResourceError",
    "UnsupportedModelError",
    "nearest",
]


class KfacError(Exception):
    """Base of all errors raised on purpose by kfacore."""

    exit_code: ClassVar[int] = 1


class ResourceError(KfacError):
    """The machine refused: a full or read-only disk, no network, a missing optional package."""

    exit_code = 1


class RankError(KfacError):
    """Another process of the run failed, has died, hangs, or is at another place."""

    exit_code = 1


class ConfigError(KfacError):
    """A key, name or value of the configuration is wrong."""

    exit_code = 2


class PluginError(KfacError):
    """A plug-in that the user named cannot be used."""

    exit_code = 2


class DataError(KfacError):
    """Data is missing, corrupt, of the wrong shape, not finite or out of range."""

    exit_code = 2


class UnsupportedModelError(KfacError):
    """A module of the model cannot be preconditioned; the message names it."""

    exit_code = 2


class NumericalError(KfacError):
    """A computation produced NaN or infinity, or no factorisation succeeded."""

    exit_code = 3


def nearest(found: str, known: Iterable[str]) -> str:
    """The hint that ends a message about an unknown name: the nearest right one, or all of them.

    Args:
        found: What the user wrote.
        known: The right names.

    Returns:
        ``"did you mean 'tridiag'?"`` or ``"known: blockdiag, tridiag"``; empty if nothing is known.
    """
    names = sorted(set(known))
    close = get_close_matches(found, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else ""
