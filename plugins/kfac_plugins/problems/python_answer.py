"""What a user's function answers, called once for a target however often it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kfac_plugins.problems.user_answer import Answer, read_answer
from kfac_plugins.problems.user_function import call, find_function, seeded
from kfacore.errors import ConfigError

__all__ = ["answer_of", "call_at"]

_DATA_SEED = 0
"""Seed of everything that the function draws for its data, so that all runs have the same."""


def call_at(seed: int, target: str, folder: str | None, arguments: Mapping[str, Any]) -> Any:
    """What the function returns with the global generators at a seed."""
    function = find_function(target, folder)
    with seeded(seed):
        return call(function, arguments, target, folder)


def answer_of(target: str, folder: str | None, arguments: Mapping[str, Any]) -> Answer:
    """What the function returns, read.

    Args:
        target: ``module:function`` or ``folder/file.py:function``, a file's name from the root.
        folder: Of the module, from the root.
        arguments: Of the function, by name; values as in a configuration.

    Raises:
        KfacError: It cannot be called, or returns something else.
    """
    if not target:
        raise ConfigError(
            "the problem 'python' needs a function that returns it: kfac train module:function, or --set "
            "problem.target=module:function"
        )
    return _answer(target, folder, json.dumps(arguments, sort_keys=True))


@lru_cache(maxsize=1)
def _answer(target: str, folder: str | None, arguments: str) -> Answer:
    """The answer, kept, because a configuration is composed before a problem is built of it."""
    return read_answer(call_at(_DATA_SEED, target, folder, json.loads(arguments)), target)
