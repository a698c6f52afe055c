"""Checkpoints: one file with everything a run needs to go on bit for bit.

Keys: ``format``, ``model``, ``optimizer``, ``averaged`` (or None), ``step``, ``seconds``, ``evaluated`` (the last step
with an evaluation, or None), ``config``, ``data`` (checksum), ``progress`` (losses so far). Only tensors, numbers,
strings and containers, so that the file loads with ``weights_only=True`` and cannot run code.

The best checkpoint has the parameters alone, with ``format``, ``model``, ``step``, ``train_loss``, ``config`` and
``data``: a run that went on from its optimizer's state too would take the same steps again.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError, KfacError
from kfacore.lab.training.files import atomic_write, disk_errors

__all__ = ["FORMAT", "Best", "Checkpoint", "load_best", "load_checkpoint", "read_model", "save_best", "save_checkpoint"]

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
        progress: First, best and last loss, the first lambda and how many steps were undone; empty in files of
            versions that did not keep them.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    averaged: Mapping[str, Any] | None
    step: int
    seconds: float
    evaluated: int | None
    config: Mapping[str, Any]
    data: str
    progress: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Best:
    """The parameters with the smallest training loss of all evaluations so far.

    Attributes:
        model: The model's parameters and buffers.
        step: The step after which they were measured.
        train_loss: Their training loss.
        config: The run's configuration.
        data: Checksum of the data.
    """

    model: Mapping[str, Tensor]
    step: int
    train_loss: float
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
    _save(path, checkpoint, remedy)


def save_best(path: Path, best: Best, *, remedy: str = "") -> None:
    """Write the best parameters. Arguments and errors as of `save_checkpoint`."""
    _save(path, best, remedy)


def _save(path: Path, state: Checkpoint | Best, remedy: str) -> None:
    content = {"format": FORMAT, **{entry.name: getattr(state, entry.name) for entry in fields(state)}}
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
    return Checkpoint(**_load(path, Checkpoint))


def load_best(path: Path) -> Best:
    """Read the best parameters of a run to the CPU.

    Args:
        path: The file.

    Raises:
        DataError: It is missing, damaged, or not a best checkpoint of kfacore.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: no evaluation of the run was better than its start")
    return Best(**_load(path, Best))


def read_model(path: Path) -> Mapping[str, Tensor]:
    """The parameters and buffers in a checkpoint of either kind.

    Raises:
        DataError: The file is damaged, or not a checkpoint of kfacore.
    """
    advice = "give a checkpoint of kfac train, checkpoint.pt or checkpoint-best.pt in a run folder"
    model: Mapping[str, Tensor] = _load(path, Checkpoint, Best, advice=advice)["model"]
    return model


def _load(
    path: Path, *kinds: type[Checkpoint | Best], advice: str = "restore it from a copy or start a new run"
) -> dict[str, Any]:
    """The entries of a file that must have those of one of the kinds."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself reads past a flipped bit
        if damaged is not None:
            raise DataError(f"{path} is damaged (part {damaged}); {advice}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (KfacError, MemoryError):
        raise
    except Exception as error:  # a spoiled file raises almost anything out of zipfile, pickle and torch
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read as a checkpoint: {reason[0]}; {advice}") from error
    needed = [{e.name for e in fields(kind) if e.default_factory is MISSING} for kind in kinds]
    found = content.keys() if isinstance(content, dict) else set()
    if not any(wanted <= found for wanted in needed):
        missing = ", ".join(sorted(needed[0] - found)) if found else "all keys"
        raise DataError(f"{path} is not a checkpoint of kfac train (missing: {missing}); name a run folder of kfac")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content.get('format')}, this version reads {FORMAT}; "
            "use the version of kfacore that wrote it (manifest.json says which)"
        )
    known = {entry.name for kind in kinds for entry in fields(kind)}
    entries = {name: value for name, value in content.items() if name in known}
    for name, value in entries.items():
        if not _FORMS[name](value):
            raise DataError(f"{path} is not a checkpoint of kfac train: its entry {name} is {value!r:.60}; {advice}")
    return entries


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: _table(value) and all(isinstance(each, Tensor) for each in value.values()),
    "optimizer": _table,
    "averaged": lambda value: value is None or _table(value),
    "step": _count,
    "seconds": lambda value: _number(value) and 0.0 <= value < math.inf,
    "evaluated": lambda value: value is None or _count(value),
    "config": _table,
    "data": lambda value: isinstance(value, str),
    "progress": _table,
    "train_loss": _number,
}
"""What the entries of either kind of file must be, so that a file of something else is refused before it is used."""
