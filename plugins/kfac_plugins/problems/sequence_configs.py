"""Config models of the problems of text, and their manifests. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from kfac_plugins.problems._files import find_file, from_the_root
from kfacore.errors import KfacError
from kfacore.plugin import Component, ProblemConfig

if TYPE_CHECKING:
    from kfacore.lab.data.status import DataStatus, Progress

__all__ = ["COMPONENTS", "NO_TEXT", "GptConfig", "ShakespeareConfig", "TextConfig"]

Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

NO_TEXT = "the problem 'text' needs a text file in UTF-8: --set problem.file=my.txt"


class GptConfig(ProblemConfig):
    """What the problems of text have in common: a small transformer on pieces of one length."""

    # A piece counts as context many examples, so that mini-batches have fewer of them, and an evaluation on all
    # pieces would take longer than the steps between two.
    run_defaults: ClassVar[dict[str, Any]] = {
        "likelihood": {"kind": "categorical"},
        "batch": {"schedule": "constant", "start": 32, "sampling": "epochs"},
        "eval": {"every": 100, "cases": 500},
    }

    file: str = ""
    """The text file, in UTF-8; a relative name is looked for in the working folder, then in data_dir and KFAC_DATA."""
    context: Count = 128
    """Tokens of a piece of text, the longest past that a prediction sees."""
    stride: Count | None = None
    """Distance of the first tokens of two pieces; by default context, so that they do not overlap."""
    test_share: Share = 0.1
    """Share at the end of the text that is kept for testing."""
    layers: Count = 3
    """Blocks of the transformer."""
    width: Count = 128
    """Numbers that stand for a token between blocks."""
    heads: Count = 4
    """Heads of each block; they must divide width."""
    dropout: Share = 0.0
    """Share of each branch that is dropped in training."""
    tied: bool = False
    """Use the weight of the embedding as that of the head."""

    def located(self) -> Self:
        """The file's name from the root if it is in the working folder."""
        return super().located().model_copy(update={"file": from_the_root(self.file)})


class ShakespeareConfig(GptConfig):
    """A character GPT on the text known as tinyshakespeare."""

    kind: Literal["shakespeare"] = "shakespeare"
    """Name of the implementation."""
    file: str = ""
    """The text file; by default tinyshakespeare.txt in data_dir, KFAC_DATA or the cache."""
    verify: bool = True
    """Refuse another text than the usual one, by checksum; false accepts any that has no other characters."""

    def data_status(self) -> DataStatus:
        """Whether the file is there."""
        from kfac_plugins.problems.shakespeare_file import shakespeare_status

        return shakespeare_status(self.file, self.data_dir)

    def fetch_data(self, folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
        """Download the file from an address that the user gives."""
        from kfac_plugins.problems.shakespeare_file import fetch_shakespeare

        return fetch_shakespeare(folder, mirrors, progress)


class TextConfig(GptConfig):
    """A GPT on your own text, in characters or words."""

    kind: Literal["text"] = "text"
    """Name of the implementation."""
    tokens: Literal["characters", "words"] = "characters"
    """What a token is; words come without the white space between them, punctuation marks count as words."""
    vocabulary: Annotated[int, Field(strict=True, ge=2)] = 20_000
    """Most tokens that have a number of their own, the most frequent ones of the training text; all others share one.
    """

    def data_status(self) -> DataStatus:
        """Whether the named file is there."""
        from kfacore.lab.data.status import DataStatus

        what = "your own text in UTF-8"
        if not self.file:
            return DataStatus(what, "missing", advice=NO_TEXT)
        try:
            path = find_file(self.file, self.data_dir, needed=NO_TEXT)
        except KfacError as error:
            return DataStatus(what, "missing", advice=str(error))
        return DataStatus(what, "unverified", (path,), DataStatus.size_of([path]))


COMPONENTS = (
    Component(
        "problem",
        "shakespeare",
        ShakespeareConfig,
        "kfac_plugins.problems.texts:Shakespeare",
        "Character GPT on tinyshakespeare.",
    ),
    Component("problem", "text", TextConfig, "kfac_plugins.problems.texts:Text", "GPT on your own text file."),
)
"""Manifests of these problems."""
