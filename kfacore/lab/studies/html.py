"""Pieces of the page: escaped text, tables, inline pictures. Imports no torch.

Plain functions and f-strings: the page has a dozen kinds of parts and no loops that a template language would make
shorter, so there is no dependency on one.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from kfacore.lab.studies.figures import COLORS, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kfacore.lab.studies.figures import Pen

__all__ = ["cell", "details", "download", "figure_html", "legend", "svg_text", "swatch", "table", "toggles"]

_CSS_COLORS = {INK: "var(--ink)", FAINT: "var(--faint)", "#e4e8eb": "var(--grid)", "#000000": "var(--ink)"} | {
    color: f"var(--c{index})" for index, color in enumerate(COLORS)
}
_SWATCHES = {"-": "solid", "--": "dashed", "-.": "double", ":": "dotted"}


def cell(content: str, *classes: str, head: str = "") -> str:
    """One cell of a table.

    Args:
        content: HTML.
        classes: Classes of the cell.
        head: ``"col"`` or ``"row"`` for a header.
    """
    kind, scope = ("th", f' scope="{head}"') if head else ("td", "")
    names = f' class="{" ".join(classes)}"' if classes else ""
    return f"<{kind}{scope}{names}>{content}</{kind}>"


def table(caption: str, header: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls on its own where the screen is narrow.

    Args:
        caption: What it shows, plain text.
        header: Header cells.
        rows: Rows, as ``<tr>``.
    """
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption>{escape(caption)}</caption>"
        f"<thead><tr>{''.join(header)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def details(title: str, content: str) -> str:
    """A part that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def download(name: str, content: str) -> str:
    """A link that saves a file which the page itself holds."""
    kind = "text/csv" if name.endswith(".csv") else "text/plain"
    data = base64.b64encode(content.encode()).decode()
    return f'<a download="{escape(name)}" href="data:{kind};charset=utf-8;base64,{data}">{escape(name)}</a>'


def swatch(pen: Pen) -> str:
    """A piece of a variant's line."""
    style = f"border-top-color:{_CSS_COLORS[pen.color]};border-top-style:{_SWATCHES[pen.line]}"
    return f'<span class="swatch" style="{style}" aria-hidden="true"></span>'


def legend(pens: Sequence[Pen]) -> str:
    """One legend for all pictures, whose boxes show and hide the variants."""
    labels = "".join(
        f'<label><input type="checkbox" checked id="show-{pen.group}"> {swatch(pen)}{escape(pen.name)}</label>'
        for pen in pens
    )
    return f'<div class="legend" role="group" aria-label="Variants in the figures">{labels}</div>'


def toggles(pens: Sequence[Pen]) -> str:
    """The style rules behind the legend's boxes; no script is needed."""
    return "".join(f"body:has(#show-{p.group}:not(:checked)) figure .{p.group}{{display:none}}" for p in pens)


def figure_html(svg: str, alt: str, name: str) -> str:
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
    return f"<figure>{inner}</figure>"


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
