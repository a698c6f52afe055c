"""The table of slots: one record each, from which registry, composer, command, docs and templates take their lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfacore.schema.slots import (
    ApproxConfig,
    DampingConfig,
    EstimatorConfig,
    ExecutorConfig,
    LayerConfig,
    LikelihoodConfig,
    MomentumConfig,
    OptimizerConfig,
    ProblemConfig,
    SinkConfig,
    SlotConfig,
    TrustConfig,
)

__all__ = ["PART_SLOTS", "RUN_SLOTS", "SLOTS", "SLOT_DEFAULTS", "Slot", "flag_of"]


UsedBy = Literal["run", "optimizer", "study", "network"]


@dataclass(frozen=True)
class Slot:
    """What can be exchanged, and all that is the same for its implementations.

    Attributes:
        name: The key that users write.
        config: Base of the config models.
        role: Name of the abstract class in `kfacore.roles`, which is imported only to build a part.
        what: What an implementation is called in sentences.
        answers: What is asked of it.
        used_by: Who has it: every ``"run"``; an ``"optimizer"`` whose manifest lists it; a ``"study"``; the
            ``"network"``, which asks every registered implementation.
        folder: Where the built-in implementations are, in `kfac_plugins`.
        default: The implementation when nobody names one; None where there is none, as for the likelihood, which is
            the problem's.
        many: Whether there may be several at once.
        flag: Whether ``kfac train`` has an option of the slot's name; otherwise ``--set`` reaches it.
    """

    name: str
    config: type[SlotConfig]
    role: str
    what: str
    answers: str
    used_by: UsedBy
    folder: str
    default: str | None = None
    many: bool = False
    flag: bool = False


_SLOTS = (
    Slot(
        "problem",
        ProblemConfig,
        role="Problem",
        what="problem",
        answers="model, data, likelihood, initialisation",
        used_by="run",
        folder="problems",
        default="curves",
        flag=True,
    ),
    Slot(
        "likelihood",
        LikelihoodConfig,
        role="Likelihood",
        what="likelihood",
        answers="nll, mean, draws, Fisher metric of the output",
        used_by="run",
        folder="likelihoods",
    ),
    Slot(
        "optimizer",
        OptimizerConfig,
        role="Optimizer",
        what="optimizer",
        answers="what trains the model",
        used_by="run",
        folder="optimizers",
        default="kfac",
        flag=True,
    ),
    Slot(
        "estimator",
        EstimatorConfig,
        role="Estimator",
        what="estimator",
        answers="what is sent back to estimate the Fisher",
        used_by="optimizer",
        folder="estimators",
        default="monte-carlo",
    ),
    # At home on any network, and the cheapest: per second it is often the better one too.
    Slot(
        "approx",
        ApproxConfig,
        role="Approximation",
        what="approximation",
        answers="which moments it needs, and how to invert them",
        used_by="optimizer",
        folder="approx",
        default="blockdiag",
        flag=True,
    ),
    Slot(
        "damping",
        DampingConfig,
        role="Damping",
        what="damping strategy",
        answers="lambda, gamma, candidates, adaptation",
        used_by="optimizer",
        folder="damping",
        default="levenberg-marquardt",
        flag=True,
    ),
    Slot(
        "momentum",
        MomentumConfig,
        role="Momentum",
        what="momentum rule",
        answers="alpha and mu of a step",
        used_by="optimizer",
        folder="momentum",
        default="quadratic-model",
        flag=True,
    ),
    Slot(
        "trust",
        TrustConfig,
        role="Trust",
        what="rule of trust",
        answers="whether a step is kept, and when that is asked",
        used_by="optimizer",
        folder="trust",
        default="none",
    ),
    Slot(
        "layer",
        LayerConfig,
        role="Layer",
        what="layer type",
        answers="which blocks a kind of module has, and their rows",
        used_by="network",
        folder="layers",
    ),
    Slot(
        "sink",
        SinkConfig,
        role="Sink",
        what="sink",
        answers="where the events of a run go",
        used_by="run",
        folder="sinks",
        default="jsonl",
        many=True,
    ),
    Slot(
        "executor",
        ExecutorConfig,
        role="Executor",
        what="executor",
        answers="where the runs of a study are executed",
        used_by="study",
        folder="executors",
        default="local",
    ),
)

SLOTS: dict[str, Slot] = {slot.name: slot for slot in _SLOTS}
"""Every slot, by name, in the order in which they are shown."""

RUN_SLOTS = tuple(slot.name for slot in _SLOTS if slot.used_by in ("run", "optimizer"))
"""Slots that are keys of a run's configuration."""

PART_SLOTS = tuple(slot.name for slot in _SLOTS if slot.used_by == "optimizer")
"""Slots that only some optimizers use: those which their manifest lists in ``uses``."""

SLOT_DEFAULTS: dict[str, str] = {slot.name: slot.default for slot in _SLOTS if slot.default is not None}
"""The implementation of each slot when nobody names one, in Python, in files and in the command alike."""


def flag_of(slot: str, name: str = "NAME") -> str:
    """How arguments of ``kfac train`` choose an implementation: ``--approx NAME`` or ``--set sink=NAME``."""
    return f"--{slot} {name}" if SLOTS[slot].flag else f"--set {slot}={name}"
