from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from kfac_cli import live
from kfac_cli.live import LiveLine, duration, figure, fitted, pace, step_parts

START = {
    "event": "start", "step": 0, "steps": 500, "run": "runs/x", "problem": "curves", "optimizer": "kfac",
    "approx": "tridiag", "device": "cpu", "dtype": "float32", "parameters": 842340, "train_cases": 20000,
    "test_cases": 10000, "seconds": 0.0,
}  # fmt: skip


def step(k, **more):
    return {"event": "step", "step": k, "seconds": 0.5 * k, "loss": 71.234567, "error": 4.5, **more}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (7620, "2h07m"), (-1, "0s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (71.234567, "71.23"), (float("nan"), "nan"), (float("-inf"), "-inf"), (3, "3")]
)
def test_figures(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms/step"),
        (0.9994, "999 ms/step"),
        (0.9996, "1 s/step"),
        (1.0666, "1.07 s/step"),
        (75, "75 s/step"),
    ],
)
def test_paces(seconds, text):
    assert pace(seconds) == text


def test_a_step_shows_what_the_optimizer_has():
    event = step(7, lam=0.0123456, gamma=0.1, alpha=0.9, mu=0.0, rho=None)
    assert step_parts(event, 500, 0.8324, 312, 0.98) == [
        "step 7/500", "loss 71.23", "error 4.5", "lambda 0.0123", "gamma 0.1", "rho 0.98", "alpha 0.9", "mu 0",
        "832 ms/step", "ETA 5m12s",
    ]  # fmt: skip
    assert step_parts(step(7), 500, 0.001, 0, None) == [
        "step 7/500", "loss 71.23", "error 4.5", "1 ms/step", "ETA 0s",
    ]  # fmt: skip


def shown(monkeypatch, events, *, terminal, width=80, interval=0.0):
    """What stderr shows after the events, and at the end."""
    file = io.StringIO()
    monkeypatch.setattr(live, "_PLAIN_SECONDS", interval)
    view = LiveLine()
    view.console = Console(file=file, force_terminal=terminal, width=width, soft_wrap=not terminal, color_system=None)
    view._handler.console = view.console
    with view:
        for event in events:
            view(event)
            if view._live is not None:
                view._live.refresh()
        logging.getLogger("kfacore.lab.training").warning("step 3: fc1: more jitter")
    return file.getvalue()


def test_without_a_terminal_lines_are_plain_and_occasional(monkeypatch):
    evaluation = {"event": "eval", "step": 2, "train_error": 4.4, "test_error": None, "averaged_train_error": 4.3}
    evaluation["averaged_test_error"] = None
    text = shown(monkeypatch, [START, step(1), step(2, rho=0.5), evaluation, step(3)], terminal=False)
    assert text.splitlines() == [
        "curves with kfac/tridiag: 842,340 parameters, 20,000 + 10,000 test examples, float32 on cpu",
        "run folder runs/x",
        "step 1/500  loss 71.23  error 4.5  500 ms/step  ETA 4m10s",
        "step 2/500  loss 71.23  error 4.5  rho 0.5  500 ms/step  ETA 4m09s",
        "step 2  error: train 4.4  averaged error: train 4.3",
        "step 3/500  loss 71.23  error 4.5  rho 0.5  500 ms/step  ETA 4m08s",
        "warning: step 3: fc1: more jitter",
    ]
    few = shown(monkeypatch, [START, step(1), step(2), step(3)], terminal=False, interval=1000.0)
    assert len(few.splitlines()) == 3


def test_on_a_terminal_the_line_is_redrawn_and_fits(monkeypatch):
    event = step(3, lam=0.0123456, gamma=0.123456, alpha=0.912345, mu=0.812345, rho=0.987654)
    text = shown(monkeypatch, [START, event], terminal=True, width=60)
    line = "step 3/500  loss 71.23  error 4.5  500 ms/step  ETA 4m08s"
    assert line in text
    assert "lambda" not in text
    assert "…" not in text
    assert "\x1b[2K" in text  # the line is erased before it is drawn again


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_stays_above_the_line_breaks_between_words(monkeypatch, width):
    text = shown(monkeypatch, [START], terminal=True, width=width)
    first = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", text[: text.index("run folder")]).splitlines()
    assert all(len(line) <= width for line in first)
    shown_words = " ".join(text.replace("\n", " ").split())
    assert "842,340 parameters, 20,000 + 10,000 test examples, float32 on cpu" in shown_words
    assert "waiting for step 1 ..." in text  # torch and the data are there


@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 80, 100, 200])
def test_what_matters_least_gives_way(width):
    event = step(3, lam=0.0123456, gamma=0.123456, alpha=0.912345, mu=0.812345, rho=0.987654)
    parts = step_parts(event, 500, 0.5, 248, 0.98, 12)
    line = fitted(parts, width)
    assert len(line) <= max(width, len(parts[0]))
    assert line.startswith("step 3/500")
    assert ("loss" in line) == (width >= 23)
    if width >= 200:
        assert line == "  ".join(parts)


@pytest.mark.parametrize("terminal", [True, False])
def test_paths_and_warnings_are_not_broken(monkeypatch, terminal):
    path = "runs/" + "a-folder-with-a-long-name-" * 5
    text = shown(monkeypatch, [{**START, "run": path}], terminal=terminal, width=40)
    assert f"run folder {path}\n" in text.replace("\r", "")
    assert "warning: step 3: fc1: more jitter" in text


def test_the_library_warns_elsewhere_again_afterwards(monkeypatch):
    shown(monkeypatch, [START], terminal=False)
    assert not any(isinstance(h, live._ConsoleHandler) for h in logging.getLogger("kfacore").handlers)


def test_undone_steps_are_counted(monkeypatch):
    events = [{**START, "rejected": 2}, step(1), step(2, rejected=True)]
    lines = shown(monkeypatch, events, terminal=False).splitlines()
    assert "loss 71.23  error 4.5  2 undone  500 ms/step" in lines[2]
    assert "3 undone" in lines[3]
    assert "undone" not in shown(monkeypatch, [START, step(1)], terminal=False)
