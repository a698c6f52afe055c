"""Slips on the command line in the words of all other errors: one line, what was found, the nearest right name."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from typing import Any

import typer

from kfacore.errors import ConfigError, nearest
from kfacore.plugin import SLOTS

__all__ = ["UsageError", "explain_usage"]

# Newer versions of typer carry a copy of click inside themselves, older ones import it: click's base of usage errors is
# reached through the one that typer offers under its own name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises for a command line that it cannot read."""


def explain_usage(error: Any) -> ConfigError | None:
    """The error as one line.

    Args:
        error: A `UsageError`.

    Returns:
        The same as a `ConfigError`; None for a call without arguments that is answered by the help.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return None
    context = error.ctx
    if context is None:  # the parser's own complaints, for example an option without its value
        return ConfigError(_lower(str(error.format_message()).rstrip(".")))
    path = context.command_path
    sentence = _sentence(error, context)
    answered = "did you mean" in sentence or "known: " in sentence
    return ConfigError(f"{path}: {sentence}" + ("" if answered else f"; {path} --help shows what it takes"))


def _sentence(error: Any, context: Any) -> str:
    """What is wrong, and what was probably meant."""
    message = str(error.format_message()).rstrip(".")
    if hasattr(error, "possibilities"):
        return f"unknown option '{error.option_name}'{_near(error.option_name, _options(context))}"
    if found := re.match(r"No such command '(.*?)'", message):
        return f"unknown command '{found[1]}', {nearest(found[1], context.command.list_commands(context))}"
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        return f"unexpected argument '{found[1]}'{_meant(found[1], _options(context))}"
    if found := re.match(r"Invalid value for '(.*?)': (.*)", message, re.DOTALL):
        return f"{found[1]}{_given(getattr(error, 'param', None))}: {_lower(found[2])}"
    return _lower(message)


def _given(parameter: Any) -> str:
    """The value of an option as it stands on the command line; nothing for arguments."""
    for option in getattr(parameter, "opts", ()):
        for index, word in enumerate(sys.argv):
            if word == option and index + 1 < len(sys.argv):
                return f" {sys.argv[index + 1]}"
            if word.startswith(f"{option}="):
                return f" {word.partition('=')[2]}"
    return ""


def _lower(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _options(context: Any) -> list[str]:
    """The options of the command that was being read."""
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def _near(option: str, options: list[str]) -> str:
    # without the dashes, which would make any two options alike
    close = get_close_matches(option.lstrip("-"), [name.lstrip("-") for name in options], n=1, cutoff=0.6)
    return f", did you mean '--{close[0]}'?" if close else ""


def _meant(words: str, options: list[str]) -> str:
    """The option that a bare word belongs to, if it names a component: ``kfac train mnist``."""
    from kfacore.registry import get_registry

    word = words.split(" ")[0]
    for slot in SLOTS:
        if f"--{slot}" in options and any(component.name == word for component in get_registry().components(slot)):
            return f", did you mean '--{slot} {word}'?"
    return ""
