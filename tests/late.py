"""Modules that tests import when they use them: each process of the suite collects every file, and one runs it."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Late"]


class Late:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # what pytest asks every name of a file for, in search of fixtures
            raise AttributeError(key)
        return getattr(importlib.import_module(self._name), key)
