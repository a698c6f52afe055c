"""How a command answers on stdout: plain aligned text that survives pipes, or one JSON document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["heading", "print_json", "several", "table", "tells", "warn_of_plugins"]


def print_json(answer: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")


def heading(text: str) -> str:
    """A heading, bold on terminals (`typer.echo` takes the codes out elsewhere)."""
    return typer.style(text, bold=True)


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows in aligned columns, two spaces apart; the last column runs free."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in cells
    )


def warn_of_plugins(registry: Registry) -> None:
    """Say on stderr which plug-ins are broken, so that a missing name is no riddle."""
    for plugin in registry.plugins():
        if plugin.state == "broken":
            typer.echo(f"note: {plugin} is broken, see kfac plugins", err=True)


def several() -> bool:
    """Whether this is one of several processes of a run, by the variables that torchrun sets."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


def tells() -> bool:
    """Whether it is the one that prints: the first."""
    return not several() or os.environ.get("RANK", "0") == "0"
