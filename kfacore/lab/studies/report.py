"""The report of a study: a page, figures and tables in one folder. Imports no torch.

::

    report.html      everything, in one file that makes no request
    figures/         PNG and SVG, with legends, for a paper
    tables/          CSV with all digits, LaTeX (booktabs) rounded
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from kfacore.errors import ConfigError
from kfacore.lab.studies.figures import TRACE_LABELS, Draw, curves, differences, panel, profile, strip, trace
from kfacore.lab.studies.html import figure_html, svg_text
from kfacore.lab.studies.html_page import page
from kfacore.lab.studies.pens import pens
from kfacore.lab.studies.plan import load_study
from kfacore.lab.studies.report_data import AXES, read_runs
from kfacore.lab.studies.report_results import Results, analyse
from kfacore.lab.studies.tables import MEASURE_NAMES, csv_tables, latex_tables
from kfacore.lab.training.figures import save_figure
from kfacore.lab.training.files import atomic_write, disk_errors, require_folder

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        html: The page.
        figures: Figures, PNG and SVG.
        tables: Tables, CSV and LaTeX.
        results: The results behind them.
    """

    html: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    results: Results = field(repr=False)

    def __str__(self) -> str:
        """The page's path, which is what a command prints."""
        return str(self.html)


@dataclass(frozen=True)
class _Group:
    """Pictures that belong together: panels on the page, one strip as a file."""

    section: str
    heading: str
    file: str
    title: str
    draws: tuple[tuple[Draw, str], ...]
    margin: float = 0.65


def write_report(folder: Path, out: Path | None = None) -> Report:
    """Write the report of a study, finished or not.

    Args:
        folder: The study folder.
        out: Where the report goes; ``report`` in the study folder by default. Files of an earlier report are
            replaced; those that this one does not have (another headline, say) stay.

    Returns:
        The files.

    Raises:
        ConfigError: There is no study in the folder, it has no runs, or `out` is a file.
        DataError: The study's files are damaged.
        ResourceError: The disk refused.
    """
    study = load_study(folder)
    if not study.runs:
        raise ConfigError(
            f"{folder} has no runs yet: its index.json is missing or empty; kfac study run FILE plans them"
        )
    out = study.folder / "report" if out is None else Path(out)
    require_folder(out, "name a folder for the report with --to")
    with disk_errors(out):
        for part in (out, out / "figures", out / "tables"):
            part.mkdir(parents=True, exist_ok=True)
    results = analyse(study, read_runs(study))
    shown, drawn = _figures(results, out / "figures")
    tables = {**csv_tables(results), **latex_tables(results)}
    html = page(results, shown, tables)
    written = tuple(_write(out / "tables" / name, content) for name, content in tables.items())
    return Report(_write(out / "report.html", html), tuple(drawn), written, results)


def _write(path: Path, text: str) -> Path:
    with disk_errors(path):
        atomic_write(path, lambda file: file.write(text.encode()))
    return path


def _figures(results: Results, folder: Path) -> tuple[dict[str, list[tuple[str, Markup]]], list[Path]]:
    """Draw everything: for the page by section, and as files."""
    shown: dict[str, list[tuple[str, Markup]]] = {}
    files: list[Path] = []
    styles = list(pens(results).values())
    for group in _groups(results):
        panels = []
        for position, (draw, alt) in enumerate(group.draws):
            figure = panel(draw, group.margin)
            if figure is not None:
                panels.append(figure_html(svg_text(figure), alt, f"{group.file}-{position}"))
        whole = strip(
            [draw for draw, _ in group.draws],
            group.title,
            styles if group.section != "differences" else [],
            group.margin,
        )
        if not panels or whole is None:
            continue
        shown.setdefault(group.section, []).append((group.heading, Markup("").join(panels)))
        files.append(save_figure(whole, folder / f"{group.file}.png"))
        files.append(_write(folder / f"{group.file}.svg", svg_text(whole)))
    return shown, files


def _groups(results: Results) -> Iterator[_Group]:
    problems = list(results.cells)
    slugs = _slugs(problems)
    several = len(problems) > 1
    for problem in problems:
        prefix = f"{problem}: " if several else ""
        for measure in _drawn_measures(results):
            name = MEASURE_NAMES[measure]
            label = name.partition(",")[0]  # the heading says whether it is of averaged parameters
            yield _Group(
                "curves",
                f"{prefix}{name}",
                f"curves-{slugs[problem]}-{measure}",
                f"{problem}: {name}",
                tuple(
                    (
                        curves(results, problem, measure, axis, label),
                        f"{name} on {problem} against {axis}, all variants",
                    )
                    for axis in AXES
                ),
            )
    label = MEASURE_NAMES[results.headline].partition(",")[0]
    drawn = tuple(
        (differences(results, problem, label), f"Differences from the reference on {problem}") for problem in problems
    )
    title = f"{MEASURE_NAMES[results.headline]}: paired differences from {results.study.reference}"
    yield _Group("differences", "", "differences", title, drawn, margin=1.6)
    if results.profiles:
        drawn = tuple((profile(results, axis), f"Performance profile in {axis}") for axis in AXES)
        yield _Group("profile", "", "profile", "Performance profile", drawn)
    for problem in problems:
        drawn = tuple((trace(results, problem, name), f"{label} on {problem}") for name, label in TRACE_LABELS.items())
        yield _Group("traces", problem if several else "", f"traces-{slugs[problem]}", f"{problem}: traces", drawn)


def _drawn_measures(results: Results) -> list[str]:
    """The headline, its test counterpart and the training loss: what is worth a row of curves."""
    headline = results.headline
    test = headline.replace("train_", "test_")
    loss = headline.replace("_error", "_loss")
    wanted = (headline, test, loss)
    return [measure for measure in dict.fromkeys(wanted) if measure in results.measures]


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """Names that are good as parts of file names, and still different from each other."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "problem"
        while slug in slugs.values():
            slug += "-2"
        slugs[name] = slug
    return slugs
