from __future__ import annotations

import json

import numpy as np
import pytest
from written_runs import write_run

from kfacore.errors import ConfigError, DataError
from kfacore.lab.training.report import compare, draw_comparison, summarise


def test_one_run(tmp_path):
    row = summarise(write_run(tmp_path, "a", [9.0, 3.0, 4.0], averaged=[None, 5.0, 2.0]), target=3.5)
    assert (row.run, row.problem, row.method, row.state) == ("a", "mnist", "kfac/tridiag", "done")
    assert (row.steps, row.cases, row.seconds) == (3, 600, 6.0)
    assert row.final == {
        "train_error": 4.0, "test_error": 5.0, "averaged_train_error": 2.0, "averaged_test_error": None,
    }  # fmt: skip
    assert row.best == {
        "train_error": 3.0, "test_error": 4.0, "averaged_train_error": 2.0, "averaged_test_error": None,
    }  # fmt: skip
    assert (row.reached_step, row.reached_seconds) == (2, 4.0)


@pytest.mark.parametrize(
    ("target", "measure", "step"),
    [(9.0, "train_error", 1), (2.9, "train_error", None), (2.0, "averaged_train_error", 3), (4.0, "test_error", 2)],
)
def test_targets(tmp_path, target, measure, step):
    run = write_run(tmp_path, "a", [9.0, 3.0, 4.0], averaged=[None, 5.0, 2.0])
    assert summarise(run, target=target, measure=measure).reached_step == step


def test_two_runs(tmp_path):
    runs = [
        write_run(tmp_path, "a", [9.0, 3.0], averaged=[None, 2.0]),
        write_run(tmp_path, "b", [8.0], optimizer="nesterov", approx=None, done=False),
    ]
    rows, plots = compare(runs)
    assert [row.method for row in rows] == ["kfac/tridiag", "nesterov"]
    assert [row.state for row in rows] == ["done", "stopped"]
    assert [plot.name for plot in plots] == ["error.png", "loss.png"]
    assert all(plot.parent == tmp_path / "report" for plot in plots)
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    json.dumps([row.as_dict() for row in rows])


def test_comparison_draws_each_run(tmp_path):
    def events(errors):
        return [{"event": "eval", "step": k, "seconds": 2.0 * k, "train_error": e} for k, e in enumerate(errors)]

    figure = draw_comparison(["one", "two"], [events([4.0, 2.0]), events([3.0, 1.0])], "error", "error")
    steps, seconds = figure.axes
    assert [list(line.get_ydata()) for line in steps.get_lines()] == [[4.0, 2.0], [3.0, 1.0]]
    np.testing.assert_allclose(seconds.get_lines()[0].get_xdata(), [0.0, 2.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


@pytest.mark.parametrize(
    ("train", "test", "scale"),
    [([0.8, 0.01, 0.0], [0.8, 0.1, 0.07], "log"), ([0.8, 0.7], [0.8, 0.1], "log"), ([0.8, 0.7], [0.8, 0.6], "linear")],
)
def test_training_and_test_rows_have_one_scale(train, test, scale):
    """Also where the training error is 0, which a logarithmic axis has no place for."""
    pairs = enumerate(zip(train, test, strict=True))
    run = [{"event": "eval", "step": k, "seconds": k, "train_error": a, "test_error": b} for k, (a, b) in pairs]
    figure = draw_comparison(["one"], [run], "error", "error")
    assert {ax.get_yscale() for ax in figure.axes} == {scale}


def test_a_torn_line_of_a_killed_run_is_left_out(tmp_path):
    run = write_run(tmp_path, "a", [9.0, 3.0], done=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "ev')
    assert summarise(run).steps == 2


def test_what_is_wrong_is_named(tmp_path):
    run = write_run(tmp_path, "a", [9.0])
    with pytest.raises(ConfigError, match="at least one run"):
        compare([])
    with pytest.raises(ConfigError, match=r"unknown measure 'train_eror'; did you mean 'train_error'"):
        summarise(run, measure="train_eror")
    with pytest.raises(DataError, match="no such folder"):
        compare([run, tmp_path / "none"])
    with pytest.raises(DataError, match=r"has no config\.json"):
        compare([tmp_path])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no events"):
        compare([run])
    (run / "metrics.jsonl").write_text("xx\n")
    with pytest.raises(DataError, match="damaged: line 1"):
        compare([run])


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        compare([write_run(tmp_path, "a", [1.0])], out=tmp_path / "f")
