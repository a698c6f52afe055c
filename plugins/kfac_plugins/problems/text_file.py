"""A text as token numbers: reading, splitting into characters or words, vocabulary, pieces. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kfacore.errors import DataError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["UNKNOWN", "Pieces", "TokenKind", "Tokens", "pieces_of", "read_text", "split_tokens", "tokens_of"]

TokenKind = Literal["characters", "words"]

UNKNOWN = "<unknown>"
"""The token that stands for all that are not in the vocabulary; number 0."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")  # noqa: RUF001  # the apostrophe of printed books


@dataclass(frozen=True)
class Tokens:
    """A text in numbers.

    Attributes:
        vocabulary: The tokens by number.
        train: Numbers of the first part of the text.
        test: Numbers of the rest.
    """

    vocabulary: tuple[str, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Text cut into pieces of one length.

    Attributes:
        inputs: (N, T) token numbers.
        targets: (N, T) the token that follows each.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def read_text(path: Path) -> str:
    """A text file in UTF-8, with one kind of line end.

    Raises:
        DataError: It is missing, is no text in UTF-8, or is empty.
        ResourceError: Not enough memory.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a text in UTF-8, found byte {error.start}: {error.reason}; store it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise ResourceError(f"{path}: not enough memory to read it; give a part of the text") from error
    if not text.strip():
        raise DataError(f"{path}: there is no text in it; give one of some thousand characters or more")
    return text


def split_tokens(text: str, kind: TokenKind) -> Sequence[str]:
    """The tokens of a text: its characters, or its words and punctuation marks without white space."""
    return text if kind == "characters" else _WORD.findall(text)


def tokens_of(tokens: Sequence[str], test_share: float, limit: int) -> Tokens:
    """Number the tokens of a text.

    The vocabulary is that of the training part, ordered by frequency and then by the token itself; whatever is not in
    it has the number 0.

    Args:
        tokens: The whole text.
        test_share: Share at its end that is kept for testing.
        limit: Largest vocabulary, `UNKNOWN` included.
    """
    import numpy as np

    train_size = len(tokens) - int(len(tokens) * test_share)
    counts = Counter(tokens[:train_size])
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = (UNKNOWN, *(token for token, _ in ranked[: limit - 1]))
    number = {token: index for index, token in enumerate(vocabulary) if index}
    numbers = np.fromiter((number.get(token, 0) for token in tokens), dtype=np.int64, count=len(tokens))
    return Tokens(vocabulary, numbers[:train_size], numbers[train_size:])


def pieces_of(numbers: NDArray[np.int64], context: int, stride: int) -> Pieces:
    """Cut a text into pieces, each with the token that follows at every position.

    Args:
        numbers: The text, (L,).
        context: Length of a piece, T.
        stride: Distance of the first tokens of two pieces; T leaves no overlap.

    Returns:
        (L - 1 - T) // stride + 1 pieces; none if the text is too short for one.
    """
    import numpy as np

    if len(numbers) <= context:
        return Pieces(np.empty((0, context), np.int64), np.empty((0, context), np.int64))
    starts = np.arange(0, len(numbers) - context, stride)
    places = starts[:, None] + np.arange(context)
    return Pieces(numbers[places], numbers[places + 1])
