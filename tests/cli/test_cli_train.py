from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from small_runs import EVAL_KEYS, events_of, settings, write_data

from kfacore.lab.training.checkpoint import load_checkpoint


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The small problem in a file, run from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text("\n".join(settings(tmp_path)))
    return ["-c", "small.toml"]


def flags(folder, *more):
    return [part for assignment in settings(folder, *more) for part in ("--set", assignment)]


def test_a_run_for_people(kfac, small, tmp_path):
    code, out, err = kfac("train", *small, "--approx", "blockdiag", "--out", "run", "--set", "pictures=true")
    assert code == 0
    assert out.startswith("done: 20 steps in ")
    assert "  training loss: first " in out
    assert f"  best parameters (step 20): {os.path.join('run', 'checkpoint-best.pt')}" in out.splitlines()
    assert "npz with kfac/blockdiag: 339 parameters, 60 + 20 test examples, float32 on cpu" in err
    assert "run folder run" in err
    assert "step 20  error: train" in err
    assert "averaged parameters: train loss" in out
    drawn = sorted(os.listdir(tmp_path / "run" / "plots"))
    assert {"progress.png", "trace.png"} <= set(drawn)
    for name in drawn:
        assert os.path.join("run", "plots", name) in out
        assert (tmp_path / "run" / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_for_programs(kfac, small, tmp_path):
    code, out, _ = kfac("train", *small, "--optimizer", "adam", "--steps", "6", "--json", "--out", "run")
    assert code == 0
    events = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [event["event"] for event in events] == [
        "start", "eval", "checkpoint", *["step"] * 5, "eval", "checkpoint", "step", "eval", "checkpoint", "done",
    ]  # fmt: skip
    assert events == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    done = events[-1]
    assert set(done) > EVAL_KEYS
    assert done["run"] == "run"
    assert all(os.path.exists(plot) for plot in done["plots"])
    assert events[3]["lam"] is None
    assert events[3]["alpha"] == 0.001


def test_the_default_folder(kfac, small, tmp_path):
    assert kfac("train", *small, "--optimizer", "adam", "--steps", "1")[0] == 0
    (folder,) = os.listdir(tmp_path / "runs")
    assert folder.startswith("npz-adam-")


def test_resume_goes_on_with_more_steps(kfac, small, tmp_path):
    assert kfac("train", *small, "--optimizer", "adam", "--out", "run", "--steps", "6")[0] == 0
    code, _, err = kfac("train", "--resume", "run", "--steps", "9", "--set", "eval.every=2")
    assert code == 0
    assert "continued after step 6" in err
    assert [event["step"] for event in events_of(tmp_path / "run", "step")] == list(range(1, 10))
    assert events_of(tmp_path / "run", "eval")[-2]["step"] == 8


def test_dry_run(kfac, small, tmp_path):
    code, out, _ = kfac("train", *small, "--approx", "tridiag", "--dry-run")
    assert code == 0
    assert 'problem = { kind = "npz"' in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0.weight", "8x16", "0", "kron", "17", "8", "tridiag", "fast", "2"] in [line[:9] for line in lines]
    assert "J v: known products" in out
    assert "memory of a step on " in out
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "small.toml"]
    code, out, _ = kfac("train", *small, "--dry-run", "--json", "--optimizer", "adam")
    table = json.loads(out)
    assert table["config"]["optimizer"]["kind"] == "adam"
    assert table["parameters"] == 339
    assert table["layers"][0] == {"name": "0", "d_in": 17, "d_out": 8, "parameters": 136, "factors": {}}


def test_damping_and_momentum_have_flags_and_a_byte_order_mark_is_skipped(kfac, small, tmp_path):
    file = tmp_path / "small.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    code, out, _ = kfac("train", *small, "--damping", "fixed", "--momentum", "none", "--dry-run", "--json")
    assert code == 0
    config = json.loads(out)["config"]
    assert (config["damping"]["kind"], config["momentum"]["kind"], config["steps"]) == ("fixed", "none", 20)


def test_the_traceback_of_a_defect_is_in_the_run_folder(kfac, small, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("one line\nand the last")

    monkeypatch.setattr("kfacore.lab.training.loop.read_scalars", broken)
    code, _, err = kfac("train", *small, "--optimizer", "adam", "--out", "run")
    assert code == 1
    file = os.path.join("run", "traceback.txt")
    last = err.splitlines()[-1]
    assert last.startswith("error: unexpected ")
    assert last.endswith(f"and the last (a defect of kfac or of a plug-in; traceback in {file})")
    assert "in broken" in (tmp_path / file).read_text()


USER_ERRORS = [
    (["--problem", "curvs"], "--problem", "did you mean 'curves'"),
    (["--approx", "tridag"], "--approx", "did you mean 'tridiag'"),
    (["--optimizer", "adam", "--approx", "tridiag"], "--approx", "adam"),
    (["--damping", "fixd"], "--damping", "did you mean 'fixed'"),
    (["--momentum", "nne"], "--momentum", "did you mean 'none'"),
    (["--optimizer", "adam", "--damping", "fixed"], "--damping", "adam"),
    (["--set", "dampin.lambda0=1"], "dampin", "did you mean 'damping'"),
    (["--set", "damping.lamda0=1"], "lamda0", "lambda0"),
    (["--steps", "0"], "--steps", "1"),
    (["--dtype", "float16"], "--dtype", "did you mean 'float64'"),
    (["--device", "cuda:77"], "cuda:77", "try auto or cpu"),
    (["-c", "none.toml"], "none.toml", "there is no configuration file"),
    (["--init", "none.npz"], "none.npz", "no such file"),
    (["--resume", "none"], "none", "no such folder"),
    (["--resume", "taken", "--out", "x"], "--out", "leave --out out"),
    (["--resume", "taken", "--init", "x"], "--init", "leave --init out"),
    (["--out", "taken"], "taken", "holds another run"),
    (["--set", "problem.file=none.npz"], "none.npz", ""),
    (["--set", "problem.file=text.npz"], "text.npz", ""),
    (["--set", "problem.file=nan.npz"], "nan.npz", "NaN"),
    (["--set", "problem.file=empty.npz"], "empty.npz", ""),
    (["--set", "problem.file=large.npz"], "large.npz", "[0, 1]"),
]


@pytest.mark.parametrize(("more", "where", "advice"), USER_ERRORS)
def test_mistakes_are_answered_in_a_line_or_two(kfac, small, tmp_path, more, where, advice):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    (tmp_path / "text.npz").write_text("hello")
    x = np.full((4, 16), 0.5, dtype=np.float32)
    np.savez(tmp_path / "nan.npz", x_train=x * np.nan)
    np.savez(tmp_path / "empty.npz", x_train=x[:0])
    np.savez(tmp_path / "large.npz", x_train=x * 10)
    base = [] if "--resume" in more else small
    code, out, err = kfac("train", *base, *(["--out", "run"] if not {"--out", "--resume"} & set(more) else []), *more)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert where in err
    assert advice in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "x").exists()


def test_a_run_that_got_worse_exits_3_and_names_a_value(kfac, small):
    more = ["--optimizer", "adam", "--set", "optimizer.lr=3.0", "--steps", "5", "--out", "run"]
    code, out, err = kfac("train", *small, *more)
    assert code == 3
    assert out.startswith("diverged: 5 steps in ")
    assert "error" not in err.replace("error:", "")  # the numbers, but no failure
    advice, command = out.splitlines()[-2:]
    assert advice == "no evaluation was below the first; try a smaller learning rate, --set optimizer.lr=0.3"
    assert command == f"kfac train -c {os.path.join('run', 'config.json')} --set optimizer.lr=0.3"
    code, out, _ = kfac(*command.split()[1:], "--out", "again")
    assert (code, out[:5]) == (0, "done:")
    code, out, err = kfac("train", *small, *more[:-1], "programs", "--json")
    assert code == 3
    done = json.loads(out.splitlines()[-1])  # stdout is for programs alone
    assert (done["verdict"], done["advice"]) == ("diverged", "a smaller learning rate, --set optimizer.lr=0.3")
    assert "diverged: 5 steps" in err


def test_divergence_exits_3(kfac, small):
    code, _, err = kfac("train", *small, "--optimizer", "sgd", "--set", "optimizer.lr=1e36", "--out", "run")
    assert code == 3
    assert "error: " in err
    assert "step" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_disk_that_cannot_be_written_exits_1(kfac, small):
    code, _, err = kfac("train", *small, "--out", "/proc/run")
    assert code == 1
    assert "error: cannot write" in err
    assert "Traceback" not in err


def test_a_folder_below_a_file_exits_2(kfac, small, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = kfac("train", *small, "--out", os.path.join("file", "run"))
    assert code == 2
    assert "file is a file; name a folder with --out that does not exist yet" in " ".join(err.split())
    assert "Traceback" not in err


# `test_training_signals` has both in this process.
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_save_and_say_how_to_go_on(tmp_path, number, code):
    write_data(tmp_path)
    script = "from kfac_cli.main import main; main()"
    command = [sys.executable, "-c", script, "train", *flags(tmp_path, "steps=1000000", "optimizer=adam")]
    command += ["--json", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                process.send_signal(number)
                break
        rest = process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == code
    last = json.loads(rest.splitlines()[-1])
    assert last["event"] == "checkpoint"
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").step == last["step"]
    assert f"kfac train --resume {tmp_path / 'run'}" in err.splitlines()  # alone on its line, to be copied
    assert "error:" not in err.splitlines()[-1]
    assert "Traceback" not in err


def test_starting_up_imports_no_torch():
    code = (
        "import sys; sys.argv = ['kfac', 'train', '--help']\n"
        "from kfac_cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--problem", "--approx", "--optimizer", "--config", "--set", "--steps", "--seed", "--preset"):
        assert flag in done.stdout
    for flag in (
        "--device",
        "--data-dir",
        "--out",
        "--init",
        "--resume",
        "--dry-run",
        "--json",
        "--threads",
        "--dtype",
    ):
        assert flag in done.stdout
