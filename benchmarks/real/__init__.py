"""K-FAC, a guest, AdamW, Muon and SOAP on models that people train: docs/explanation/real.md."""

from benchmarks.real.command import main

__all__ = ["main"]
