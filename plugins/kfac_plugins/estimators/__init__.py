"""Estimators of the Fisher's statistics: config models and manifests. Imports no torch."""

from __future__ import annotations

from kfacore.plugin import Component

__all__ = ["COMPONENTS"]

COMPONENTS: tuple[Component, ...] = ()
