"""Trainers of others with a guest: evaluation, checkpoint and resume come to the run that never stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import ROOT, load

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Trainers log every step of theirs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    yield
    logging.disable(before)


def test_transformers_trainer_resumes_and_is_ahead(tmp_path: Path) -> None:
    program = load(EXAMPLES / "hf_trainer.py")
    cut = torch.tensor([min(ord(letter), 127) for letter in program.TEXT[: 32 * 800]]).view(-1, 32)
    pieces = [{"input_ids": piece, "labels": piece} for piece in cut]
    alone, guest = (program.train(pieces, wrapped, 30, str(tmp_path / str(wrapped))) for wrapped in (False, True))
    again = program.train(pieces, True, 30, str(tmp_path / "True"), str(tmp_path / "True" / "checkpoint-15"))
    assert guest < alone
    assert again == guest


def test_the_users_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 120)
    program = load(EXAMPLES / "hf_trainer.py")
    alone, guest = program.main(4, (tmp_path / "text.txt").read_text())
    assert alone > 0
    assert guest > 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore::UserWarning:lightning")
def test_lightning_resumes_and_is_ahead(tmp_path: Path) -> None:
    program = load(EXAMPLES / "lightning_trainer.py")
    alone, guest = (program.train(wrapped, 3, str(tmp_path / str(wrapped))) for wrapped in (False, True))
    assert guest < alone
    assert program.train(True, 3, str(tmp_path / "True"), str(tmp_path / "True" / "epoch=0.ckpt")) == guest


def test_accelerate_resumes_and_is_ahead(tmp_path: Path) -> None:
    program = load(EXAMPLES / "accelerated.py")
    alone, guest = (program.train(wrapped, 30, str(tmp_path / str(wrapped))) for wrapped in (False, True))
    assert guest < alone
    assert program.train(True, 30, str(tmp_path / "True"), resume=True) == guest
