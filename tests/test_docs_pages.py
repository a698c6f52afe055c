"""The pages of the docs: found in two clicks, short, with tables that nobody typed, and built without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from test_docs import DOCS, NOTES, ROOT, name_of, prose_of

import kfacore
from kfacore.plugin import SLOTS

INDEX = ROOT / "docs" / "index.md"
PAGES = [page for page in DOCS if page.is_relative_to(ROOT / "docs")]

QUESTIONS = {
    "How do I train my CNN?": "Give `KFAC` the network",
    "How do I use it in my own loop?": "`report = optimizer.step(inputs, targets)`",
    "How do I add a type of layer?": "one class in a plug-in",
    "How do I resume?": "`kfac train --resume RUN`",
    "Does it run on two GPUs?": "start the same program several times",
    "How do I cite it?": "Cite the method",
    "Which approximation do I choose?": "Start with `blockdiag`",
    "What does it cost?": "two to three times one of SGD",
    "What if a run diverges?": "the run folder keeps the best parameters",
    "How do I write a plug-in?": "A plug-in is a Python distribution",
}
"""What a stranger asks, and words of the answer."""


def links_of(page: Path) -> list[tuple[str, Path]]:
    """The text and the file of every link to another page."""
    found = re.findall(
        r"(?<!!)\[([^\]]+)\]\(([^)#\s]+\.md)[^)]*\)", " ".join(prose_of(page.read_text("utf-8")).split())
    )
    return [(text, (page.parent / target).resolve()) for text, target in found]


def first_paragraph(page: Path) -> str:
    """What stands below the title."""
    title, paragraph = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    return " ".join(paragraph.split())


# --- found -----------------------------------------------------------------------------------------------------------


def test_the_index_is_one_click_from_the_readme() -> None:
    assert INDEX in [target for _, target in links_of(ROOT / "README.md")]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_in_the_first_paragraph_two_clicks_away(question: str) -> None:
    answer = dict(links_of(INDEX))[question]
    assert QUESTIONS[question] in first_paragraph(answer)


def test_the_index_asks_these_questions() -> None:
    assert [text for text, _ in links_of(INDEX) if text.endswith("?")] == list(QUESTIONS)


def test_every_page_is_reached_from_the_index() -> None:
    reached = {target for page in (INDEX, ROOT / "docs" / "notes" / "index.md") for _, target in links_of(page)}
    assert [name_of(page) for page in (*PAGES, *NOTES) if page not in reached | {INDEX}] == []


def test_every_page_begins_with_a_paragraph() -> None:
    assert [name_of(page) for page in PAGES if first_paragraph(page).startswith(("#", "```", "|"))] == []


def test_the_architecture_has_every_room_and_every_slot() -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    core = ROOT / "kfacore"
    rooms = [path.parent for folder in (core, core / "lab") for path in folder.glob("*/__init__.py")]
    assert [name_of(room) for room in rooms if room != core / "lab" and f"| `{name_of(room)}/` |" not in text] == []
    assert [slot for slot in SLOTS if f"| `{slot}` |" not in text] == []


# --- short -----------------------------------------------------------------------------------------------------------


def lines_of_prose(text: str) -> list[str]:
    """Lines that are neither code nor table, without inline code and the targets of links."""
    lines = [line for line in prose_of(text).split("\n") if not line.startswith(("|", "    "))]
    return [re.sub(r"`[^`]*`|\]\([^)]*\)", "", line) for line in lines]


def numbers_of(line: str) -> list[str]:
    """The numbers of a line: 3, 0.25, 1/4, 10,000; not those that are part of a word."""
    return re.findall(r"(?<![\w.^-])\d+(?:[.,/]\d+)*(?![\w-])", line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short_and_without_heaps_of_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert [line for line in prose_of(text).split("\n") if len(line) > 120 and not line.startswith("|")] == []
    assert [line for line in lines_of_prose(text) if len(numbers_of(line)) > 3] == []


def test_a_heap_of_numbers_would_be_found() -> None:
    (line,) = lines_of_prose("It took 3.5, 4 and 1,000 seconds, 1/4 more than `approx.power` 1")
    assert numbers_of(line) == ["3.5", "4", "1,000", "1/4", "1"]
    assert numbers_of("float32, M14 and x^2: none") == []


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


# --- tables, notes, versions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "figures" / "tables.py"))


def test_tables_are_made_from_their_sources(tables: dict[str, Any]) -> None:
    for document in (*DOCS, *NOTES):
        text = document.read_text(encoding="utf-8")
        assert tables["written"](text) == text, f"{name_of(document)}: run python docs/figures/tables.py"


def test_a_table_that_was_typed_would_be_found(tables: dict[str, Any]) -> None:
    text = "<!-- table: results -->\n| my own | 0.1 |\n<!-- end of table -->\n"
    assert "tridiag" in tables["written"](text)


def test_measured_numbers_name_machine_and_command() -> None:
    for file in (ROOT / "docs" / "figures").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert '"machine"' in text, file.name
        assert re.search(r"python -m benchmarks|kfac study run", text), file.name


@pytest.mark.parametrize("note", NOTES, ids=name_of)
def test_notes_have_a_date_and_their_conclusion_first(note: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-[a-z-]+\.md", note.name)
    assert first_paragraph(note).startswith("**Conclusion:** ")


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == kfacore.__version__
    assert f"\nversion: {kfacore.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{kfacore.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_extra_for_docs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert {re.split(r"[>=]", need)[0] for need in project["optional-dependencies"]["docs"]} <= pinned


def test_one_report_is_kept_as_an_example_and_it_is_small() -> None:
    (report,) = (ROOT / "docs").rglob("*.html")
    assert report.stat().st_size < 350_000


# --- built -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "furo", "myst_parser")),
    reason="Sphinx is not installed; `make docs` installs it",
)
def test_the_docs_build_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-b", "html", "docs", str(tmp_path / "html")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "reference" / "kfacore.html").read_text(encoding="utf-8")
    assert 'id="kfacore.KFAC.step"' in page
