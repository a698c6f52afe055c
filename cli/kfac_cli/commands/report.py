"""The command `kfac report`: several runs in one table and one set of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfacore.lab.training.report import RunSummary

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def report(
        runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
        target: Annotated[
            float | None,
            typer.Option(metavar="X", help="Show when each run first reached this error (at an evaluation)."),
        ] = None,
        measure: Annotated[
            str,
            typer.Option(metavar="NAME", help="The error meant by --target: [averaged_](train|test)_error."),
        ] = "train_error",
        out: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Folder of the pictures; report beside the first run by default."),
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    ) -> None:
        """Compare runs: errors, steps, examples, seconds, and curves in one picture."""
        from kfacore.lab.training.report import compare

        rows, plots = compare(runs, target=target, measure=measure, out=out)
        if json:
            from kfac_cli.answers import print_json

            print_json({"runs": [row.as_dict() for row in rows], "plots": [str(plot) for plot in plots]})
            return
        typer.echo(_table(rows, target, measure))
        for plot in plots:
            typer.echo(str(plot))


def _table(rows: Sequence[RunSummary], target: float | None, measure: str) -> str:
    """One row a run; errors as final (best)."""
    from kfac_cli.live import duration, figure

    used = [name for name in _COLUMNS if any(row.final[name] is not None for row in rows)]
    header = [
        "run",
        "problem",
        "method",
        "seed",
        "steps",
        "examples",
        "time",
        "loss",
        *(_COLUMNS[name] for name in used),
    ]
    if target is not None:
        header.append(f"{_COLUMNS[measure]} <= {figure(target)}")
    lines = [header]
    for row in rows:
        line = [
            row.run,
            row.problem,
            row.method,
            str(row.seed),
            f"{row.steps}{'' if row.state == 'done' else f' ({row.state})'}",
            f"{row.cases:,}",
            duration(row.seconds),
            f"{figure(row.losses.first)} / {figure(row.losses.best)} / {figure(row.losses.last)}",
            *(
                "-" if row.final[name] is None else f"{figure(row.final[name])} ({figure(row.best[name])})"
                for name in used
            ),
        ]
        if target is not None:
            reached = row.reached_step is not None and row.reached_seconds is not None
            line.append(
                f"step {row.reached_step}, {duration(row.reached_seconds or 0.0)}" if reached else "not reached"
            )
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    colored = [
        typer.style(text, fg="red") if row.state == "diverged" else text
        for text, row in zip(aligned[1:], rows, strict=True)
    ]
    text = "\n".join([aligned[0], *colored])
    return f"{text}\nloss: training loss, first / best / last; errors: at the last evaluation (best of all evaluations)"


_COLUMNS = {
    "train_error": "train",
    "test_error": "test",
    "averaged_train_error": "averaged train",
    "averaged_test_error": "averaged test",
}
