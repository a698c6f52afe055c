"""Problems of text: predict the next token at every position of a piece."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

from kfac_plugins.problems._files import find_file
from kfac_plugins.problems.sequence_configs import NO_TEXT, GptConfig, ShakespeareConfig, TextConfig
from kfac_plugins.problems.shakespeare_file import CHARACTERS, find_shakespeare, is_standard
from kfac_plugins.problems.text_file import Tokens, pieces_of, read_text, split_tokens, tokens_of
from kfacore.errors import DataError
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.models import GPT
from kfacore.roles import Problem, ProblemData, Split

__all__ = ["Shakespeare", "Text"]


class _Texts(Problem):
    """A small transformer on pieces of a text; inputs and targets are (N, context) token numbers."""

    config: GptConfig
    task: Literal["autoencoder", "classifier", "regression"] = "classifier"

    def _model(self, tokens: int, generator: torch.Generator) -> nn.Module:
        c = self.config
        return GPT(
            tokens,
            c.context,
            layers=c.layers,
            width=c.width,
            heads=c.heads,
            dropout=c.dropout,
            tied=c.tied,
            generator=generator,
        )

    def _data(self, tokens: Tokens, source: str, facts: dict[str, object]) -> ProblemData:
        """Cut both parts of a text into pieces.

        Raises:
            DataError: The text is too short for one piece.
        """
        config = self.config
        splits: list[Split | None] = []
        for numbers in (tokens.train, tokens.test):
            pieces = pieces_of(numbers, config.context, config.stride or config.context)
            tensors = (torch.from_numpy(array) for array in asdict(pieces).values())
            splits.append(Split(*tensors) if len(pieces.inputs) else None)
        train, test = splits
        if train is None:
            raise DataError(
                f"{source}: its training part has {len(tokens.train)} tokens, and a piece needs "
                f"{config.context + 1}; give a longer text or set a smaller problem.context"
            )
        checksum = sha256_of_arrays(*(part.inputs.numpy() for part in splits if part is not None), tokens.train[-1:])
        return ProblemData(train, test, checksum, source, {"tokens": len(tokens.vocabulary), **facts})


class Shakespeare(_Texts):
    """A character GPT on tinyshakespeare: 65 characters, the last tenth of the text for testing."""

    Config: ClassVar[type[ShakespeareConfig]] = ShakespeareConfig
    config: ShakespeareConfig

    def load(self) -> ProblemData:
        """Read and verify the text."""
        config = self.config
        path = find_shakespeare(config.file, config.data_dir)
        standard = is_standard(path)
        if config.verify and not standard:
            raise DataError(
                f"{path}: wrong checksum, this is not the usual text of the problem 'shakespeare'; set "
                "problem.verify=false to use it as it is, or use the problem 'text' for a text of your own"
            )
        text = read_text(path)
        others = sorted(set(text) - set(CHARACTERS))
        if others:
            raise DataError(
                f"{path}: has {len(others)} characters that the problem 'shakespeare' does not know, for example "
                f"{others[0]!r}; use the problem 'text' (--problem text --set problem.file={path})"
            )
        number = {character: index for index, character in enumerate(CHARACTERS)}
        numbers = np.fromiter((number[character] for character in text), dtype=np.int64, count=len(text))
        size = len(numbers) - int(len(numbers) * config.test_share)
        tokens = Tokens(tuple(CHARACTERS), numbers[:size], numbers[size:])
        return self._data(tokens, str(path), {"standard_text": standard})

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """See `kfacore.lab.models.GPT`."""
        return self._model(len(CHARACTERS), generator)


class Text(_Texts):
    """A GPT on a user's own text; the vocabulary comes from the text."""

    Config: ClassVar[type[TextConfig]] = TextConfig
    config: TextConfig

    def __init__(self, config: TextConfig | None = None) -> None:
        super().__init__(config)
        self._read: tuple[Tokens, str] | None = None

    @property
    def text(self) -> tuple[Tokens, str]:
        """The text in numbers and the file, read on first use.

        Raises:
            ConfigError: No file is named.
            DataError: The file is missing or no text.
        """
        if self._read is None:
            config = self.config
            path = find_file(config.file, config.data_dir, needed=NO_TEXT)
            tokens = split_tokens(read_text(path), config.tokens)
            self._read = tokens_of(tokens, config.test_share, config.vocabulary), str(path)
        return self._read

    def load(self) -> ProblemData:
        """Read, split and number the text."""
        tokens, source = self.text
        known = [float((part != 0).mean()) if len(part) else 1.0 for part in (tokens.train, tokens.test)]
        return self._data(tokens, source, {"known_train": known[0], "known_test": known[1]})

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """See `kfacore.lab.models.GPT`."""
        return self._model(len(self.text[0].vocabulary), generator)
