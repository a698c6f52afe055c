"""Executors of studies: configs and manifests. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kfacore.plugin import Component, ExecutorConfig

__all__ = ["COMPONENTS", "LocalConfig", "SlurmConfig"]

Whole = Annotated[int, Field(strict=True, ge=1)]


class LocalConfig(ExecutorConfig):
    """Options of the executor on this machine."""

    kind: Literal["local"] = "local"
    """Name of the implementation."""
    start: Literal["auto", "fork", "spawn"] = "auto"
    """How a run's process is made: fork from one process that has imported torch, or spawn a new interpreter each
    time; auto forks on Linux and spawns elsewhere."""


class SlurmConfig(ExecutorConfig):
    """Options of the executor on a cluster with SLURM, through submitit (extra ``kfacore[slurm]``)."""

    kind: Literal["slurm"] = "slurm"
    """Name of the implementation."""
    workers: Whole = 32
    """Jobs queued or running at the same time."""
    minutes: Whole = 60
    """Time limit of a job; a run that needs longer goes on from its checkpoint in the next job."""
    partition: str | None = None
    """Partition of the cluster; its default if left out."""
    memory_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Memory of a job; the cluster's default if left out."""
    gpus: Annotated[int, Field(strict=True, ge=0)] = 0
    """GPUs of a job, on each of its machines."""
    nodes: Whole = 1
    """Machines that the processes of a run are spread over."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of sbatch, by their long names, for example ``{ account = "lab" }``."""
    cluster: Literal["slurm", "local"] = "slurm"
    """Where submitit sends the jobs: local runs them on this machine, to try things out without a cluster."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "executor",
        "local",
        LocalConfig,
        "kfac_plugins.executors.local:Local",
        "Processes on this machine.",
    ),
    Component(
        "executor",
        "slurm",
        SlurmConfig,
        "kfac_plugins.executors.slurm:Slurm",
        "Jobs of a SLURM cluster (extra [slurm]), requeued when they are preempted.",
    ),
)
"""Manifests of this slot."""
