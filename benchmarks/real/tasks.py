"""The five models, and the data that they are trained on: problems of ``kfac train`` with files that the user has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.robust.task import Task
from kfacore.registry import get_registry

__all__ = ["MODELS", "Model", "absent", "build"]

_HELD = 24
"""Pieces of text that an evaluation takes; of images it takes 400."""


@dataclass(frozen=True)
class Model:
    """A model with its data.

    Attributes:
        file: The file of its data, in the folder that the command names.
        problem: The problem of ``kfac train`` without its file.
        batches: Cases of a mini-batch to choose among.
        held: Cases of an evaluation.
    """

    file: str
    problem: Mapping[str, Any]
    batches: tuple[int, ...]
    held: int


_IMAGES = {"kind": "images"}

MODELS: dict[str, Model] = {
    "gpt": Model("tinyshakespeare.txt", {"kind": "shakespeare"}, (8, 32), _HELD),
    "words": Model(
        "kjv.txt",
        {"kind": "text", "tokens": "words", "vocabulary": 4000, "context": 64, "layers": 2, "width": 64},
        (16, 64),
        2 * _HELD,
    ),
    "cnn": Model("clipart32.npz", {**_IMAGES, "model": "cnn", "width": 16, "depth": 2}, (64, 256), 400),
    "resnet": Model("clipart32.npz", {**_IMAGES, "model": "resnet"}, (64, 256), 400),
    "vit": Model("clipart32.npz", {**_IMAGES, "model": "vit", "width": 64, "depth": 3}, (64, 256), 400),
}
"""By name. The GPT has 3 layers of width 128 and a context of 128; the word model the 4,000 most frequent words."""


def absent(name: str, data: Path) -> str | None:
    """Why a model cannot be trained here, or nothing."""
    file = data / MODELS[name].file
    return None if file.is_file() else f"{name} needs {file.name}, which is not in {data}: name its folder with --data"


def build(name: str, data: Path, batch: int, seed: int) -> Task:
    """The model as it is before training, with all data."""
    spec = MODELS[name]
    problem = get_registry().build("problem", {**spec.problem, "file": str((data / spec.file).resolve())})
    found = problem.load()
    assert found.test is not None
    held = torch.linspace(0, len(found.test) - 1, min(spec.held, len(found.test))).long()
    model = problem.build_model(torch.Generator().manual_seed(seed))
    return Task(
        model=model,
        x=found.train.inputs,
        y=found.train.targets,
        x_test=found.test.inputs[held],
        y_test=found.test.targets[held],
        likelihood="categorical",
        batch=batch,
    )
