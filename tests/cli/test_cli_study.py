"""`kfac study run` and `status` as people and programs use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE, until
from small_studies import write_study

from kfac_cli.study_live import StudyLive
from kfacore.lab.studies.plan import load_study

BODY = """
[[variants]]
name = "kfac"
[[variants]]
name = "explodes"
optimizer = { kind = "sgd", lr = 1e30 }
"""


def test_a_study_with_a_failure_for_programs_and_people(kfac, tmp_path) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body=BODY)
    code, out, err = kfac("study", "run", file, "--json", "--out", "out")
    assert code == 4
    events = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["study", "done"]
    assert {event["variant"]: event["state"] for event in events if event["event"] == "ended"} == {
        "kfac": "done", "explodes": "diverged",
    }  # fmt: skip
    assert "diverged explodes (npz, seed 0, " in err
    assert "study tiny: 1 done, 1 diverged, in out" in err
    code, out, _ = kfac("study", "status", "out")
    assert code == 0
    assert "study tiny: 1 done, 1 diverged" in out
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert [(row[0], row[1], row[2], row[3]) for row in rows] == [
        ("kfac", "npz", "0", "done"), ("explodes", "npz", "0", "diverged"),
    ]  # fmt: skip
    code, out, _ = kfac("study", "status", file, "--out", "out", "--json")
    found = json.loads(out)
    assert found["counts"]["done"] == 1
    assert [run["state"] for run in found["runs"]] == ["done", "diverged"]


def test_dry_run_writes_nothing_and_needs_no_torch(tmp_path) -> None:
    file = write_study(tmp_path)
    script = (
        "import sys; from kfac_cli.main import main\n"
        f"sys.argv = ['kfac', 'study', 'run', {str(file)!r}, '--dry-run', '--out', {str(tmp_path / 'out')!r}]\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert lines[-2] == "12 runs: 4 variants x 1 problem x 3 seeds"
    assert len([line for line in lines if line.endswith("pending")]) == 12
    assert not (tmp_path / "out").exists()


def test_dry_run_for_programs_shows_tuning(kfac, tmp_path) -> None:
    body = BODY + "[variants.tune]\naxes.optimizer.lr = [0.1, 0.2]\n"
    code, out, _ = kfac("study", "run", write_study(tmp_path, seeds=2, body=body), "--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert [run["tuning"] for run in found["runs"]] == [True, True, False, False]
    assert found["waiting"] == [{"variant": "explodes", "problem": "npz", "runs": 2}]
    code, out, _ = kfac("study", "run", tmp_path / "tiny.toml", "--dry-run")
    assert "6 runs: 2 variants x 1 problem x 2 seeds, 2 for tuning" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.toml"], "there is no configuration file 'none.toml'"),
        (["run", "tiny.toml", "--executor", "lokal"], "unknown executor 'lokal', did you mean 'local'"),
        (
            ["run", "tiny.toml", "--set", "executor.wokers=2"],
            "unknown key 'wokers' in executor, did you mean 'workers'",
        ),
        (["run", "tiny.toml", "--workers", "0"], "executor.workers"),
        (["status", "."], "is not a study folder"),
        (["status", "tiny.toml"], "studies-out/tiny is not a study folder"),
    ],
)
def test_mistakes_are_answered_in_a_line(kfac, tmp_path, arguments, message) -> None:
    write_study(tmp_path)
    code, _, err = kfac("study", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_the_schema_of_studies(kfac) -> None:
    code, out, _ = kfac("schema", "study")
    assert code == 0
    assert json.loads(out)["title"] == "kfac study"
    code, _, err = kfac("schema", "studies")
    assert code == 2
    assert "there is no schema of 'studies', did you mean 'study'?" in err


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path) -> None:
    file = write_study(tmp_path, steps=100_000, seeds=1, body="")
    command = [sys.executable, "-c", "from kfac_cli.main import main; main()", "study", "run", file.name, "--out", "o"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: any('"step": 2,' in path.read_text() for path in tmp_path.glob("o/runs/*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "stopping: 1 run finishes its step and is saved" in err
    assert "Go on with:\nkfac study run tiny.toml --out o\n" in err
    study = load_study(tmp_path / "o")
    assert study.counts()["pending"] == 1
    assert (study.runs[0].path / "checkpoint.pt").exists()
    assert os.listdir(next(Path(tmp_path / "o" / "machines").iterdir())) == []


EVENT = {"run": "abc", "variant": "kfac", "problem": "npz", "seed": 3}
COUNTS = {"pending": 1, "running": 0, "done": 1, "failed": 0, "diverged": 0}


class TestLive:
    def test_plain_lines_where_there_is_no_terminal(self, capsys) -> None:
        with StudyLive() as live:
            live({"event": "study", "name": "s", "total": 2, **COUNTS})
            live({"event": "started", **EVENT})
            live({"event": "progress", **EVENT, "step": 5, "steps": 9, "error": 0.25, "seconds": 61.0})
            end = {"state": "failed", "reason": "it broke", "tuning": False, **COUNTS}
            live({"event": "ended", **EVENT, **end})
            chosen = {"optimizer": {"lr": 0.1}}
            live({"event": "tuned", "variant": "sgd", "problem": "npz", "chosen": chosen})
        assert capsys.readouterr().err.splitlines() == [
            "study s: 2 runs, 1 done, 1 pending",
            "started kfac (npz, seed 3, abc)",
            "failed kfac (npz, seed 3, abc): it broke",
            "tuned sgd on npz: optimizer.lr = 0.1",
        ]

    def test_the_table_of_a_terminal(self) -> None:
        from rich.console import Console

        live = StudyLive()
        live({"event": "study", "name": "s", "total": 2, **COUNTS})
        live({"event": "progress", **EVENT, "step": 5, "steps": 10**9, "error": 0.25, "seconds": 61.0})
        ended = {"event": "ended", "run": "x", "variant": "sgd", "problem": "npz", "seed": 0, "state": "done"}
        live({**ended, "reason": "", "tuning": False, **COUNTS})
        console = Console(width=90, record=True, quiet=True, file=open(os.devnull, "w"))  # noqa: SIM115  # closed below
        console.quiet = False
        console.print(live._table())
        text = console.export_text()
        console.file.close()
        assert "1 done, 1 pending" in text
        assert "step 5, error 0.25, 1m01s" in text
        assert "sgd" in text
