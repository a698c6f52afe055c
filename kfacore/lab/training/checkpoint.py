"""Checkpoints: one file with everything a run needs to go on bit for bit.

Keys: ``format``, ``model``, ``optimizer``, ``averaged`` (or None), ``step``, ``seconds``, ``evaluated`` (the last step
with an evaluation, or None), ``config``, ``data`` (checksum). Only tensors, numbers, strings and containers, so that
the file loads with ``weights_only=True`` and cannot run code.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError
from kfacore.lab.training.files import atomic_write, disk_errors

__all__ = ["FORMAT", "Checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT = 2
"""Raised when checkpoints of one version can no longer be read by another: 2 with the inverses as pairs of layers."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        model: The model's parameters and buffers.
        optimizer: The optimizer's state.
        averaged: State of the iterate average, or None.
        step: Steps taken.
        seconds: Training seconds so far.
        evaluated: The last step with an evaluation, or None.
        config: The run's configuration.
        data: Checksum of the data.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    averaged: Mapping[str, Any] | None
    step: int
    seconds: float
    evaluated: int | None
    config: Mapping[str, Any]
    data: str


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, remedy: str = "") -> None:
    """Write a checkpoint so that the file is the old one or the new one, never a part.

    Args:
        path: The file.
        checkpoint: The state.
        remedy: What the message of a failure adds, for example how to continue from the old file.

    Raises:
        ResourceError: The disk is full or read-only; the old file is intact.
    """
    content = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}}
    with disk_errors(path, remedy):
        try:
            atomic_write(path, lambda file: torch.save(content, file))
        except RuntimeError as error:
            # torch's zip writer reports a failed write as a RuntimeError raised while the OSError is handled
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Args:
        path: The file.

    Raises:
        DataError: It is missing, damaged, or not a checkpoint of kfacore.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: the run has no checkpoint; delete its folder and start it again")
    advice = "restore it from a copy or start a new run"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself reads past a flipped bit
        if damaged is not None:
            raise DataError(f"{path} is damaged (part {damaged}); {advice}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read as a checkpoint: {reason[0]}; {advice}") from error
    wanted = set(Checkpoint.__dataclass_fields__)
    if not isinstance(content, dict) or not wanted <= content.keys():
        missing = ", ".join(sorted(wanted - content.keys())) if isinstance(content, dict) else "all keys"
        raise DataError(f"{path} is not a checkpoint of kfac train (missing: {missing}); name a run folder of kfac")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content.get('format')}, this version reads {FORMAT}; "
            "use the version of kfacore that wrote it (manifest.json says which)"
        )
    return Checkpoint(**{name: content[name] for name in wanted})
