"""What a step costs on N ranks: a model of operations, bytes and latency, and the points that it is checked against."""

from benchmarks.ranks.command import main

__all__ = ["main"]
