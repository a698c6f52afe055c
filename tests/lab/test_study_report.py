"""The report of a study: what it says, what it writes, and that the page asks for nothing."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from patience import PATIENCE
from study_folders import STEPS, error_at, write_study
from study_reports import STATES, VARIANTS, cell, page_of, whole_study

from kfacore.errors import ConfigError, DataError
from kfacore.lab.studies.machine import Presence
from kfacore.lab.studies.plan import Study, load_study
from kfacore.lab.studies.report import write_report
from kfacore.lab.studies.report_data import read_runs
from kfacore.lab.studies.report_results import analyse
from kfacore.lab.studies.state import state_folder
from kfacore.lab.studies.tables import amount, csv_tables, latex_tables


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return whole_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def results(study):
    loaded = load_study(study.folder)
    return analyse(loaded, read_runs(loaded))


@pytest.fixture(scope="module")
def report(study):
    return write_report(study.folder)


@pytest.fixture(scope="module")
def html(report):
    return report.html.read_text()


def table(report, name):
    path = next(path for path in report.tables if path.name == name)
    return list(csv.DictReader(path.read_text().splitlines()))


# What is written


def test_everything_is_written(report):
    assert report.html.name == "report.html"
    assert str(report) == str(report.html)
    names = {path.name for path in report.figures}
    for stem in ("curves-curves-averaged_train_error", "differences", "profile", "traces-curves"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    for path in report.figures:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    tables = {path.name for path in report.tables}
    assert tables >= {"runs.csv", "final.csv", "differences.csv", "targets.csv", "profile.csv"}
    assert tables >= {"final.tex", "differences.tex", "targets.tex"}


def test_csv_has_every_run_and_all_digits(report, results):
    rows = table(report, "runs.csv")
    assert len(rows) == 24
    lost = [row for row in rows if row["state"] != "done"]
    assert [(row["variant"], row["reason"]) for row in lost] == [
        ("wild & <b>", "the loss of step 31 is nan"),
        ("nesterov", "killed <oom>"),
    ]
    assert all(row["final_train_error"] == "" for row in lost)
    assert all(float(row["last_train_error"]) > 0.0 for row in lost), "the numbers of lost runs are not hidden"
    by_hash = {run.planned.hash: run for run in results.runs}
    for row in rows:
        if row["state"] == "done":
            assert float(row["final_train_error"]) == by_hash[row["hash"]].final("train_error")
            assert row["steps"] == str(STEPS)
    final = next(
        row
        for row in table(report, "final.csv")
        if (row["variant"], row["measure"], row["kind"]) == ("wild & <b>", "train_error", "final")
    )
    assert (final["runs"], final["done"], final["diverged"], final["n"]) == ("6", "5", "1", "5")
    row = next(row for row in table(report, "differences.csv") if row["measure"] == "averaged_train_error")
    assert float(row["mean"]) == cell(results, "blockdiag").differences["averaged_train_error"].mean
    assert row["verdict"] == "worse"


def test_a_run_that_came_to_its_end_far_above_its_best_has_diverged(tmp_path):
    """Also where an earlier version has called it done."""
    study = write_study(tmp_path, {"good": {}, "bad": {"blowup": 36}}, seeds=1)
    loaded = load_study(study.folder)
    results = analyse(loaded, read_runs(loaded))
    good, bad = results.runs
    assert (good.state, bad.state) == ("done", "diverged")
    assert bad.reason.startswith("it got worse: training loss first ")
    assert bad.final("train_error") is None
    assert bad.latest("train_error") > 1000 * bad.smallest("train_error")
    assert cell(results, "bad").verdict == "broken"
    text = page_of(loaded)
    lost = text[text.index('id="lost"') :]
    assert "it got worse: training loss first" in lost
    assert amount(bad.latest(results.headline)) in lost
    assert amount(bad.smallest(results.headline)) in lost
    assert "1 of 1 diverged" in text


@pytest.fixture
def no_png(monkeypatch):
    """Every picture is drawn as SVG too, and a second time takes as long."""
    monkeypatch.setattr("kfacore.lab.studies.report.save_figure", lambda figure, path: path)


@pytest.mark.usefixtures("no_png")
@pytest.mark.parametrize("zeros", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_errors_of_zero_draw_without_a_warning(tmp_path, monkeypatch, zeros):
    """Warnings are errors here."""
    shift = 2.0 if zeros == "some" else 100.0
    monkeypatch.setattr("study_folders.error_at", lambda *args: max(0.0, error_at(*args) - shift))
    write_report(write_study(tmp_path, VARIANTS, states=STATES, seeds=3).folder)


def test_latex_is_balanced_and_escaped(report):
    for path in report.tables:
        if path.suffix != ".tex":
            continue
        text = path.read_text()
        body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(columns) - 1}
        assert len(body) >= 4
        for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
            assert command in text
        assert r"wild \& <b>" in text
        assert not re.search(r"\\pm|[+-]\d", re.sub(r"\$[^$]*\$", "", "".join(body)))  # numbers are in math mode
        assert not re.search(r"[^\x00-\x7f]", text)


@pytest.mark.usefixtures("no_png")
def test_several_problems_stand_under_their_names(tmp_path):
    study = write_study(
        tmp_path,
        {"base": {}, "other_one": {"floor": 2.0}},
        problems=("a b", "a/b"),
        seeds=3,
        approx=None,
        averaged=False,
    )
    report = write_report(study.folder)  # without an approximation there is little to draw, which saves time
    text = (tmp_path / "report" / "tables" / "final.tex").read_text()
    assert [text.count(rf"\emph{{{name}}}") for name in ("a b", "a/b")] == [1, 1]
    assert r"other\_one" in text
    names = {path.name for path in report.figures}
    assert {"traces-a-b.png", "traces-a-b-2.png"} <= names  # names that differ only in what files cannot have
    assert "<h3>a/b</h3>" in report.html.read_text()


class Parsed(HTMLParser):
    """Collects what a browser could fetch, identifiers, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched, self.ids, self.links, self.stack, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.fetched += [
            values[key] for key in ("src", "srcset", "poster", "action", "data", "background") if key in values
        ]
        self.links += [values[key] for key in ("href", "xlink:href") if key in values]
        if "id" in values:
            self.ids.append(values["id"])
        if tag not in ("meta", "link", "input", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "input", "br"):
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_page_makes_no_request_and_is_well_formed(html):
    found = Parsed()
    found.feed(html)
    assert found.stack == []
    assert found.fetched == []
    assert not {"script", "iframe", "object", "embed", "img", "base"} & set(found.tags)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert not re.search(r"url\((?!#)|@import|@font-face|https?:|//www|file:", html)
    assert len(found.ids) == len(set(found.ids))
    anchors = {link[1:] for link in found.links if link.startswith("#")}
    assert anchors <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(found.ids)


def test_names_are_never_markup(tmp_path):
    study = write_study(tmp_path, {"<i>": {}, '"<u>': {}}, problems=("<s>", "a<b"), seeds=1, name="<u>")
    html = page_of(study)
    assert not re.search(r"<[isu]>|a<b", html)
    assert html.count("a&lt;b") > 3


def test_page_says_the_answer_first(html):
    top = html[: html.index('id="curves"')]
    text = re.sub(r"<[^>]+>", "", top[top.index("<body>") :])
    assert "Reference tridiag" in text
    assert re.search(r"Worse:\s*blockdiag", text)
    assert "wild &amp; &lt;b&gt; (1 of 6 diverged" in text
    assert "22 of 24 runs done, 1 diverged, 1 failed" in text
    assert "killed &lt;oom&gt;" in text
    assert "the loss of step 31 is nan" in text
    assert "<b>" not in html  # names are never markup


def test_page_has_accessible_tables_and_pictures(html):
    assert html.count("<table>") == html.count("<caption>") > 3
    assert '<th scope="row">' in html
    assert '<th scope="col"' in html
    assert html.count("<figure>") == html.count('role="img" aria-label=') > 9
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_every_variant_can_be_hidden(html):
    for index in range(4):
        assert f'id="show-v{index}"' in html
        assert f"body:has(#show-v{index}:not(:checked)) figure .v{index}" in html
        assert f'<g class="v{index}">' in html


def test_page_holds_what_is_needed_to_run_it_again(html, study):
    for text in (
        "torch 2.13.0",
        "kfac train -c runs/HASH/config.json",
        study.runs[0].hash,
        "Configuration of blockdiag",
    ):
        assert text in html
    assert '"reference": "tridiag"' in unescape(html)
    links = re.findall(r'download="([^"]+)"', html)
    assert {"runs.csv", "final.tex"} <= set(links)


def test_page_names_no_folder_of_the_machine(tmp_path):
    study = write_study(tmp_path, {"a": {}, "b": {}})
    study = replace(study, base={"problem": {"kind": "curves", "data_dir": "/home/someone/data"}})
    file = study.runs[0].path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["problem"] = {**config.get("problem", {}), "kind": "curves", "data_dir": "/home/someone/data"}
    file.write_text(json.dumps(config), encoding="utf-8")
    html = page_of(study)
    assert "Configuration of a on" in html
    assert "/home/someone" not in html
    assert str(tmp_path) not in html


def test_different_machines_are_pointed_out(tmp_path):
    study = write_study(tmp_path, {"base": {}, "other": {}}, seeds=1)
    file = tmp_path / "runs" / study.runs[1].hash / "manifest.json"
    file.write_text(file.read_text().replace('"cpu"', '"cuda"').replace("2.13.0", "2.14.0"))
    html = page_of(study)
    assert "different machines or devices" in html
    assert "different versions" in html


def test_one_machine_is_one_whatever_it_computed_in(tmp_path):
    study = write_study(tmp_path, {"base": {}, "other": {}}, seeds=1)
    file = tmp_path / "runs" / study.runs[1].hash / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace("float32", "float64"))
    assert "different machines" not in page_of(study)
    file.write_text(text.replace('"x86_64",', '"x86_64", "host": "0123abcd",'))
    assert "different machines" in page_of(study)


def test_shared_wall_times_are_marked(tmp_path, html):
    assert "†" not in html
    study = write_study(tmp_path, {"base": {}, "other": {}}, seeds=1)
    (state_folder(tmp_path, study.runs[0].hash) / "shared").touch()
    assert Presence(tmp_path, study.runs[0].hash).shared
    assert "Other runs of this study used the machine at the same time" in page_of(study)
    results = analyse(study, read_runs(study))
    rows = csv.DictReader(csv_tables(results)["runs.csv"].splitlines())
    assert [row["shared_machine"] for row in rows] == ["yes", "no"]
    assert "shared with other runs" in latex_tables(results)["targets.tex"]


def test_the_same_study_gives_the_same_bytes(study, report, tmp_path):
    again = write_report(study.folder, tmp_path / "again")
    assert again.html.read_bytes() == report.html.read_bytes()
    for one, other in zip(report.figures, again.figures, strict=True):
        assert one.name == other.name
        if one.suffix == ".svg":
            assert one.read_bytes() == other.read_bytes()


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a study folder"):
        write_report(tmp_path)
    study = write_study(tmp_path / "s", {"base": {}}, seeds=1)
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match=r"is a file; .* --to"):
        write_report(study.folder, tmp_path / "f")
    study.index_file.unlink()
    with pytest.raises(ConfigError, match="has no runs yet"):
        write_report(study.folder)
    study.study_file.write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        write_report(study.folder)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder behind a web server: the folder, its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append(self.path)

        def log_message(self, *arguments):
            """Say nothing: refusals are in the list too."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def screenshot(address: str, folder: Path, width: int) -> np.ndarray:
    """What a browser shows of a page, as an image."""
    from matplotlib.image import imread

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    options += [f"--screenshot={folder / 'page.png'}", f"--user-data-dir={folder / 'profile'}", address]
    subprocess.run([BROWSER, *options], check=True, capture_output=True, timeout=PATIENCE)
    return imread(folder / "page.png")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_asks_for_the_page_and_nothing_else(report, served, width):
    """Where Chromium is installed; elsewhere the policy in the page and the static test above stand for it."""
    folder, address, asked = served
    html = report.html.read_text()
    assert "default-src 'none'" in html
    if BROWSER is None:
        return
    (folder / "report.html").write_text(html)
    image = screenshot(f"{address}/report.html", folder, width)
    assert asked == ["/report.html"]
    assert image.shape[1] == width
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50  # text in several colours, not an empty page
    (folder / "other.html").write_text('<!doctype html><title>x</title><img src="picture.png">')
    screenshot(f"{address}/other.html", folder, width)
    assert "/picture.png" in asked  # so that the list above means something
