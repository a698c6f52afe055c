from __future__ import annotations

import json

import pytest
from written_runs import write_run


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path, "a", [9.0, 3.0, 4.0], averaged=[None, 5.0, 2.0])
    write_run(tmp_path, "b", [8.0], optimizer="nesterov", approx=None, done=False)
    return ["a", "b"]


def test_two_runs_in_a_table(kfac, runs, tmp_path):
    code, out, _ = kfac("report", *runs, "--target", "3.5")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "run"
    assert "train <= 3.5" in lines[0]
    assert "averaged train" in lines[0]
    first, second = lines[1].split(), lines[2].split()
    assert first[:7] == ["a", "mnist", "kfac/tridiag", "0", "3", "600", "6s"]
    assert "4 (3)" in lines[1]
    assert "step 2, 4s" in lines[1]
    assert second[:3] == ["b", "mnist", "nesterov"]
    assert "1 (stopped)" in lines[2]
    assert "not reached" in lines[2]
    assert lines[-1] == str(tmp_path / "report" / "loss.png")


def test_json(kfac, runs):
    code, out, _ = kfac("report", *runs, "--json", "--out", "pictures", "--measure", "test_error", "--target", "4")
    assert code == 0
    answer = json.loads(out)
    assert [row["run"] for row in answer["runs"]] == runs
    assert answer["runs"][0]["reached_step"] == 2
    assert answer["runs"][0]["best"]["train_error"] == 3.0
    assert answer["plots"] == ["pictures/error.png", "pictures/loss.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["none"], "no such folder"), (["--measure", "tran_error"], "did you mean 'train_error'")],
)
def test_mistakes(kfac, runs, more, message):
    code, out, err = kfac("report", *runs, *more)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_no_run_is_a_usage_error(kfac):
    assert kfac("report")[0] == 2
