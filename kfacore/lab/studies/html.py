"""What the template of the page, `templates/report.html`, is filled with, and inline pictures. Imports no torch."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from kfacore.lab.studies.pens import COLORS, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kfacore.lab.studies.pens import Pen

__all__ = ["Cell", "Row", "Stroke", "Table", "figure_html", "heads", "render", "strokes", "svg_text"]

_CSS_COLORS = {INK: "var(--ink)", FAINT: "var(--faint)", "#e4e8eb": "var(--grid)", "#000000": "var(--ink)"} | {
    color: f"var(--c{index})" for index, color in enumerate(COLORS)
}
_SWATCHES = {"-": "solid", "--": "dashed", "-.": "double", ":": "dotted"}


@dataclass(frozen=True)
class Stroke:
    """A variant's line, as style sheets say it.

    Attributes:
        name: The variant.
        group: The class of its lines in the figures.
        css: Its color.
        style: Its border style.
    """

    name: str
    group: str
    css: str
    style: str


def strokes(pens: Sequence[Pen]) -> list[Stroke]:
    """The lines of the variants."""
    return [Stroke(pen.name, pen.group, _CSS_COLORS[pen.color], _SWATCHES[pen.line]) for pen in pens]


@dataclass(frozen=True)
class Cell:
    """One cell of a table; all of it is text, which the template escapes.

    Attributes:
        text: What it says.
        style: Classes.
        head: ``"col"`` or ``"row"`` for a header.
        pen: A piece of a line in front.
        code: A name in the program's letters behind it.
        below: A second line.
    """

    text: str
    style: str = ""
    head: str = ""
    pen: Stroke | None = None
    code: str = ""
    below: str = ""


@dataclass(frozen=True)
class Row:
    """Cells, and the class of their row."""

    cells: Sequence[Cell]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls on its own where the screen is narrow."""

    caption: str
    header: Sequence[Cell]
    rows: Sequence[Row]


def heads(*names: str) -> list[Cell]:
    """Header cells of columns."""
    return [Cell(name, head="col") for name in names]


def render(**values: Any) -> str:
    """The page.

    Args:
        values: What `templates/report.html` names; a name that is missing is an error.
    """
    return _template().render(css=Markup(_text("report.css")), **values)


@cache
def _template() -> Template:
    options = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return options.from_string(_text("report.html"))


def _text(name: str) -> str:
    return files("kfacore.lab.studies").joinpath("templates", name).read_text(encoding="utf-8")


def figure_html(svg: str, alt: str, name: str) -> Markup:
    """A picture in the page.

    Args:
        svg: What `svg_text` returned.
        alt: What is to be seen, for those who cannot see it.
        name: Makes the identifiers in the picture unique in the page.
    """
    inner = svg[svg.index("<svg") :]
    head, body = inner[: inner.index(">")], inner[inner.index(">") :]
    inner = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", head) + body
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', inner)
    inner = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", inner)
    inner = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', inner)
    inner = re.sub(r"#[0-9a-f]{6}\b", lambda match: _CSS_COLORS.get(match[0], match[0]), inner)
    inner = re.sub(r'<g id="[^"]*patch_1">.*?</g>', "", inner, count=1, flags=re.DOTALL)  # the white ground of the file
    inner = inner.replace("#ffffff", "none")
    inner = inner.replace("<svg", f'<svg role="img" aria-label="{escape(alt, quote=True)}"', 1)
    return Markup(f"<figure>{inner}</figure>")


def svg_text(figure: Figure) -> str:
    """A figure as SVG whose text stays text, the same bytes for the same figure."""
    import matplotlib

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kfacore"}):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="(v\d+)">', r'<g class="\1">', text)  # many lines are one variant's: no identifier
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", text)  # hundredths of a point are enough, and halve the size
