"""Sixty problems that nobody tuned for, K-FAC with nothing set, and what else people use, in equal time."""

from __future__ import annotations

from benchmarks.robust.command import main

__all__ = ["main"]
