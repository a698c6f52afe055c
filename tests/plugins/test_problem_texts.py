"""Problems of text: the suite, tokens and pieces, finding and fetching, and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import string
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kfac_plugins.problems import shakespeare_file
from kfac_plugins.problems.sequence_configs import ShakespeareConfig, TextConfig
from kfac_plugins.problems.shakespeare_file import CHARACTERS, fetch_shakespeare, shakespeare_status
from kfac_plugins.problems.text_file import UNKNOWN, pieces_of, split_tokens, tokens_of
from kfac_plugins.problems.texts import Shakespeare, Text
from kfacore.errors import ConfigError, DataError
from kfacore.lab.data.fetch import RemoteFile
from kfacore.testing import ProblemSuite

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 8
SMALL: dict[str, Any] = {"context": 8, "layers": 1, "width": 8, "heads": 2}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KFAC_DATA", raising=False)
    monkeypatch.delenv("KFAC_MIRROR", raising=False)


def written(folder: Path, text: str = PLAY) -> dict[str, Any]:
    (folder / "play.txt").write_text(text, encoding="utf-8")
    return {"file": str(folder / "play.txt"), **SMALL}


class TestShakespeareSuite(ProblemSuite):
    name = "shakespeare"
    reads_files = True
    options: ClassVar[dict[str, Any]] = SMALL

    def data(self, folder: Path) -> dict[str, Any]:
        return {**written(folder), "verify": False}


class TestCharactersSuite(ProblemSuite):
    name = "text"
    reads_files = True
    sizes_from_data = True

    def data(self, folder: Path) -> dict[str, Any]:
        return {**written(folder), "tied": True}


class TestWordsSuite(ProblemSuite):
    name = "text"
    reads_files = True
    sizes_from_data = True

    def data(self, folder: Path) -> dict[str, Any]:
        return {**written(folder), "tokens": "words", "vocabulary": 9, "dropout": 0.2}


def test_words_and_punctuation_marks_are_tokens() -> None:
    assert split_tokens("Don't stop -- 2 o'clock,\nnow!", "words") == [
        "Don't", "stop", "-", "-", "2", "o'clock", ",", "now", "!",
    ]  # fmt: skip
    assert list(split_tokens("a b\n", "characters")) == ["a", " ", "b", "\n"]


def test_the_vocabulary_is_of_the_training_part_by_frequency() -> None:
    tokens = tokens_of(list("aabbbc") + list("zzab"), 0.4, limit=3)
    assert tokens.vocabulary == (UNKNOWN, "b", "a")
    assert tokens.train.tolist() == [2, 2, 1, 1, 1, 0]
    assert tokens.test.tolist() == [0, 0, 2, 1]


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_pieces_have_the_token_that_follows(stride: int) -> None:
    text = np.arange(12)
    pieces = pieces_of(text, 4, stride)
    assert len(pieces.inputs) == (12 - 1 - 4) // stride + 1
    assert np.array_equal(pieces.targets, pieces.inputs + 1)
    assert pieces.inputs[:, 0].tolist() == list(range(0, 12 - 4, stride))
    assert pieces_of(text[:4], 4, stride).inputs.shape == (0, 4)


def test_the_standard_characters_are_those_of_the_text() -> None:
    assert len(CHARACTERS) == 65
    assert list(CHARACTERS) == sorted(set(CHARACTERS))
    assert set(CHARACTERS) > set(string.ascii_letters)


def test_shakespeare_loads_without_overlap(tmp_path: Path) -> None:
    problem = Shakespeare(ShakespeareConfig.model_validate({**written(tmp_path), "verify": False}))
    data = problem.load()
    assert data.test is not None
    assert data.train.inputs.shape == (((len(PLAY) - len(PLAY) // 10) - 1) // 8, 8)
    assert torch.equal(data.train.inputs[0, 1:], data.train.targets[0, :-1])
    assert "".join(CHARACTERS[i] for i in data.train.inputs[:2].flatten().tolist()) == PLAY[:16]
    assert data.facts["standard_text"] is False


def test_another_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wrong checksum.*problem\.verify=false"):
        Shakespeare(ShakespeareConfig.model_validate(written(tmp_path))).load()
    other = {**written(tmp_path, PLAY + "ß"), "verify": False}
    with pytest.raises(DataError, match=r"1 characters .* for example 'ß'; use the problem 'text'"):
        Shakespeare(ShakespeareConfig.model_validate(other)).load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n ", "there is no text"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
        (b"short", "has 5 tokens, and a piece needs 9"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "play.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Text(TextConfig.model_validate({"file": str(tmp_path / "play.txt"), **SMALL})).load()


def test_a_file_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set problem\.file=my\.txt"):
        Text(TextConfig.model_validate(SMALL)).load()
    with pytest.raises(DataError, match=r"char-rnn.*--mirror URL"):
        Shakespeare(ShakespeareConfig.model_validate(SMALL)).load()
    with pytest.raises(ConfigError, match="10 cannot be shared by 4 heads"):
        Shakespeare(ShakespeareConfig.model_validate({"width": 10})).build_model(torch.Generator())


def test_it_is_fetched_from_an_address_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quiet(name: str, done: int, total: int | None) -> None:
        pass

    with pytest.raises(ConfigError, match=r"no server is built in .*--mirror URL or KFAC_MIRROR"):
        fetch_shakespeare(tmp_path, (), quiet)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "input.txt").write_text(PLAY)
    file = RemoteFile("input.txt", hashlib.sha256(PLAY.encode()).hexdigest())
    monkeypatch.setattr(shakespeare_file, "FILE", file)
    assert shakespeare_status("", str(tmp_path)).state == "missing"
    (path,) = fetch_shakespeare(tmp_path, [(tmp_path / "server").as_uri()], quiet)
    status = shakespeare_status("", str(tmp_path))
    assert (status.state, status.where) == ("verified", (path,))
    Shakespeare(ShakespeareConfig.model_validate({"data_dir": str(tmp_path), **SMALL})).load()
    path.write_text(PLAY + "x")
    assert shakespeare_status("", str(tmp_path)).state == "unverified"
