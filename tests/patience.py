"""How long a test waits for other processes and threads before it fails."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE", "until"]

PATIENCE = 900.0
"""Seconds that a machine with much else to do may take; only a failure waits so long."""


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds.

    Args:
        condition: Asked again and again.
    """
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
