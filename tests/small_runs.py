"""A problem small enough that a whole run takes a fraction of a second; shared by the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.loop import train
from kfacore.registry import get_registry

KEYS = ("train_loss", "train_error", "test_loss", "test_error")
EVAL_KEYS = {*KEYS, *(f"averaged_{key}" for key in KEYS)}


def write_data(folder: Path, **changes: np.ndarray) -> Path:
    """60 training and 20 test cases of 16 numbers in [0, 1] that three hidden numbers explain."""
    rng = np.random.default_rng(3)
    x = (rng.random((80, 3)) @ rng.random((3, 16)) / 3).astype(np.float32)
    path = folder / "data.npz"
    np.savez(path, **{"x_train": x[:60], "x_test": x[60:], **changes})
    return path


def settings(folder: Path, *more: str) -> list[str]:
    """Assignments for ``--set``; one a line, a TOML file."""
    return [
        'problem.kind="npz"',
        f"problem.file={json.dumps(str(folder / 'data.npz'))}",
        "problem.sizes=[8, 3, 8]",
        "problem.code_layer=2",
        'likelihood="bernoulli"',
        "steps=20",
        "threads=1",
        "batch.start=20",
        "batch.target_step=15",
        "averaging.start=8",
        "eval.every=5",
        "eval.early=false",
        "checkpoint.every=5",
        "pictures=false",  # most of the time of a run this small
        *more,
    ]


def small_config(folder: Path, *more: str) -> Any:
    """The configuration of the small problem, whose data file is written if it is not there yet."""
    if not (folder / "data.npz").exists():
        write_data(folder)
    return resolve(get_registry(), sets=settings(folder, *more))


def run(folder: Path, name: str, *more: str, **options: Any) -> Any:
    """Train the small problem in ``folder / name``."""
    return train(small_config(folder, *more), registry=get_registry(), out=folder / name, **options)


def events_of(path: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run, without what depends on the clock."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in event.items() if key != "seconds"}
        for event in events
        if not kinds or event["event"] in kinds
    ]
