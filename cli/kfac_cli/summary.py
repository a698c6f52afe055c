"""What the command says at the end of a run: whether it went well, its numbers, and what to do if it did not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from kfac_cli.live import counted, duration, figure

if TYPE_CHECKING:
    from kfacore.lab.training.results import RunResult

__all__ = ["summary"]


def summary(result: RunResult) -> Iterator[str]:
    """The lines, with colours that `typer.echo` takes out where there is no terminal.

    Args:
        result: The end of the run.

    Yields:
        ``done: 300 steps in 4m10s of training`` or ``diverged: ...``; first, best and last loss; loss and error of
        current and averaged parameters; steps undone; where the best parameters are; the pictures; and after a
        divergence what to try, and as the last line the command that tries it.
    """
    diverged = result.verdict == "diverged"
    length = f"{counted(result.step, 'step')} in {duration(result.seconds)} of training"
    yield typer.style("diverged", fg="red", bold=True) + f": {length}" if diverged else f"done: {length}"
    yield f"  training loss: {result.losses}"
    for name, prefix in (("current parameters", ""), ("averaged parameters", "averaged_")):
        numbers = [
            f"{part} {kind} {figure(value)}"
            for part in ("train", "test")
            for kind in ("loss", "error")
            if (value := result.measures.get(f"{prefix}{part}_{kind}")) is not None
        ]
        if numbers:
            yield f"  {name}: {', '.join(numbers)}"
    if result.rejected:
        yield f"  {counted(result.rejected, 'step')} undone"
    if result.best is not None:
        yield f"  best parameters (step {result.losses.best_step}): {result.best}"
    for plot in result.plots:
        yield f"  {plot}"
    if diverged:
        yield from _way_out(result)


def _way_out(result: RunResult) -> Iterator[str]:
    """What to try: the advice, and a command on a line of its own, to be copied."""
    if result.best is None:
        yield f"no evaluation was below the first; try {result.advice}"
    else:
        yield f"try {result.advice}; from the best parameters on:"
    command = ["kfac", "train", "-c", str(result.run / "config.json")]
    if result.best is not None:
        command += ["--init", str(result.best)]
    option = result.advice.partition("--set ")[2]
    if option:
        command += ["--set", option]
        yield shlex.join(command)
