"""Trust in steps: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kfacore.plugin import Component, TrustConfig

__all__ = ["COMPONENTS", "NoTrustConfig", "UndoConfig"]

Count = Annotated[int, Field(strict=True, ge=1)]
Above1 = Annotated[float, Field(gt=1.0)]


class NoTrustConfig(TrustConfig):
    """Options of taking every step."""

    kind: Literal["none"] = "none"
    """Name of the implementation."""


class UndoConfig(TrustConfig):
    """Options of undoing steps that raise the objective."""

    kind: Literal["undo"] = "undo"
    """Name of the implementation."""

    attempts: Count = 8
    """How often the first mini-batch is solved, with lambda raised in between, until a step is accepted."""
    settling: Count = 10
    """Steps at the start, and after every step undone, in which each step is asked about."""
    bold: Annotated[float, Field(gt=0.0)] = 0.5
    """A step is asked about if the quadratic model promises to take away more than this share of the objective."""
    doubt: Above1 = 1.5
    """A mini-batch whose objective is this many times the mean of the last ten makes the step before it doubtful."""
    worse: Above1 = 1.2
    """A doubtful step is undone if the new mini-batch's objective is this many times what it is without that step."""
    every_step: bool = True
    """Whether every step is looked at, which on a GPU is a wait or two; without, between steps that are asked about the
    device decides alone, and on small noisy mini-batches a run may fall apart. On a CPU every step is."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "trust",
        "none",
        NoTrustConfig,
        "kfac_plugins.trust.none:NoTrust",
        "Every step is taken, as in the paper.",
    ),
    Component(
        "trust",
        "undo",
        UndoConfig,
        "kfac_plugins.trust.undo:Undo",
        "Steps that raise the objective are undone, and lambda raised.",
    ),
)
