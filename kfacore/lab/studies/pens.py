"""How the variants of a study are drawn, the same in all pictures and in the page. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfacore.lab.studies.report_results import Results

__all__ = ["COLORS", "FAINT", "INK", "Pen", "pens"]

INK, FAINT = "#14202b", "#71808c"
COLORS = ("#1b6ca8", "#d1661f", "#2e8b57", "#8a4fbe", "#a87900", "#c23b5a", "#0f8b9a", "#77604a")
_LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Pen:
    """How a variant is drawn, the same in all pictures.

    Attributes:
        name: The variant.
        color: Its colour; ink for the reference.
        line: Line style.
        width: Line width.
        group: Class of everything drawn for it, by which the page shows and hides it.
    """

    name: str
    color: str
    line: Literal["-", "--", "-.", ":"]
    width: float
    group: str


def pens(results: Results) -> dict[str, Pen]:
    """A pen for each variant, by name; the reference first."""
    names = sorted((v.name for v in results.study.variants), key=lambda name: name != results.study.reference)
    found = {}
    for index, name in enumerate(names):
        if index == 0:
            found[name] = Pen(name, INK, "-", 2.2, "v0")
        else:
            cycle, color = divmod(index - 1, len(COLORS))
            found[name] = Pen(name, COLORS[color], _LINES[cycle % len(_LINES)], 1.5, f"v{index}")
    return found
