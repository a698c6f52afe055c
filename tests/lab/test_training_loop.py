from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import EVAL_KEYS, KEYS, events_of, run, settings, small_config, write_data

from kfacore.errors import ConfigError, DataError, NumericalError, ResourceError
from kfacore.lab.training.checkpoint import load_checkpoint
from kfacore.lab.training.loop import train
from kfacore.lab.training.results import read_scalars
from kfacore.lab.training.resume import resume_config
from kfacore.lab.training.signals import Interrupted, Terminated
from kfacore.registry import get_registry
from kfacore.roles import StepReport

STEP_KEYS = {
    "event", "step", "batch_size", "loss", "objective", "error", "lam", "gamma", "rho", "alpha", "mu", "seconds",
}  # fmt: skip


def equal(x, y):
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


def assert_same_run(one, other, steps):
    """Bit for bit: parameters, optimizer, average; every step and the evaluations that both made."""
    a, b = load_checkpoint(one / "checkpoint.pt"), load_checkpoint(other / "checkpoint.pt")
    assert a.step == b.step == steps
    for name in ("model", "optimizer", "averaged", "evaluated"):
        assert equal(getattr(a, name), getattr(b, name)), name
    assert events_of(one, "step", "eval") == events_of(other, "step", "eval")
    assert [event["step"] for event in events_of(one, "step")] == list(range(1, steps + 1))


def again(folder, name, *more, listeners=()):
    config = resume_config(get_registry(), folder / name, sets=more)
    return train(config, registry=get_registry(), resume=folder / name, listeners=listeners)


def raising(number, step, times=1):
    def listener(event):
        if event["event"] == "step" and event["step"] == step:
            for _ in range(times):
                signal.raise_signal(number)

    return listener


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seen = []
    write_data(folder)
    result = run(folder, "a", listeners=[seen.append])
    return folder, result, seen


class TestARun:
    def test_folder(self, folder):
        path = folder[0] / "a"
        assert sorted(p.name for p in path.iterdir()) == [
            "checkpoint-best.pt", "checkpoint.pt", "config.json", "manifest.json", "metrics.jsonl",
        ]  # fmt: skip
        assert json.loads((path / "config.json").read_text()) == small_config(folder[0]).as_dict()

    def test_manifest(self, folder):
        manifest = json.loads((folder[0] / "a" / "manifest.json").read_text())
        assert manifest["versions"]["torch"] == torch.__version__
        assert manifest["plugins"][0]["distribution"] == "kfacore"
        assert manifest["threads"] == 1
        assert manifest["seed"] == 0
        assert len(manifest["data"]["checksum"]) == 64
        assert manifest["data"]["train_cases"] == 60
        assert manifest["parameters"] == 16 * 8 + 8 + 8 * 3 + 3 + 3 * 8 + 8 + 8 * 16 + 16

    def test_events_are_what_listeners_saw_and_strict_json(self, folder):
        lines = (folder[0] / "a" / "metrics.jsonl").read_text().splitlines()
        written = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        assert written == json.loads(json.dumps([dict(event) for event in folder[2]]))

    def test_order_and_keys(self, folder):
        events = events_of(folder[0] / "a")
        assert [event["event"] for event in events[:3]] == ["start", "eval", "checkpoint"]
        assert [event["event"] for event in events[-3:]] == ["eval", "checkpoint", "done"]
        for event in folder[2]:
            if event["event"] == "step":
                assert set(event) == STEP_KEYS
                assert event["batch_size"] >= 20
                assert event["lam"] > 0
            if event["event"] == "eval":
                assert set(event) == {"event", "step", "seconds"} | EVAL_KEYS
                assert (event["averaged_train_loss"] is None) == (event["step"] < 8)
        assert [event["step"] for event in events if event["event"] == "eval"] == [0, 5, 10, 15, 20]
        assert [event["step"] for event in events if event["event"] == "checkpoint"] == [0, 5, 10, 15, 20]
        assert events[-4]["batch_size"] == 60
        assert events[-1]["notices"] == {}

    def test_seconds_never_go_back(self, folder):
        seconds = [event["seconds"] for event in folder[2]]
        assert seconds == sorted(seconds)
        assert 0.0 == seconds[0] < seconds[-1] == folder[1].seconds

    def test_it_learns(self, folder):
        first, last = (event for event in events_of(folder[0] / "a", "eval") if event["step"] in (0, 20))
        assert last["train_error"] < 0.5 * first["train_error"]
        assert folder[1].measures == {key: last[key] for key in EVAL_KEYS}

    def test_threads_are_given_back(self, folder):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            run(folder[0], "threads", "steps=1", "optimizer=nesterov")
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_a_second_run_there_is_refused(self, folder):
        with pytest.raises(ConfigError, match="holds another run"):
            run(folder[0], "a")
        assert events_of(folder[0] / "a")[-1]["event"] == "done"

    def test_resume_and_out_exclude_each_other(self, folder):
        with pytest.raises(ConfigError, match="keeps its folder"):
            run(folder[0], "b", resume=folder[0] / "a")


@pytest.mark.parametrize("method", ["approx=tridiag", "approx=blockdiag", "optimizer=nesterov", "optimizer=adam"])
def test_20_steps_are_10_and_10_bit_for_bit(tmp_path, method):
    run(tmp_path, "whole", method)
    run(tmp_path, "parts", method, "steps=10")
    result = again(tmp_path, "parts", "steps=20")
    assert result.step == 20
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["steps"] == 20
    assert json.loads((tmp_path / "parts" / "manifest.json").read_text())["resumed"][0]["step"] == 10
    assert [event["event"] for event in events_of(tmp_path / "parts")].count("done") == 1


@pytest.mark.parametrize("step", [1, 4, 5, 7, 19, 20])
def test_an_interruption_anywhere_changes_nothing(tmp_path, step):
    sets = ("optimizer=adam", "eval.early=true")  # an early evaluation after step 1 belongs to a resumed run too
    run(tmp_path, "whole", *sets)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, "parts", *sets, listeners=[raising(signal.SIGINT, step)])
    assert caught.value.exit_code == 130
    assert f"kfac train --resume {tmp_path / 'parts'}" in str(caught.value)
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt").step == step
    assert events_of(tmp_path / "parts")[-1] == {
        "event": "checkpoint", "step": step, "path": str(tmp_path / "parts" / "checkpoint.pt"),
    }  # fmt: skip
    again(tmp_path, "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)


def test_sigterm(tmp_path):
    with pytest.raises(Terminated) as caught:
        run(tmp_path, "a", "optimizer=adam", listeners=[raising(signal.SIGTERM, 3)])
    assert caught.value.exit_code == 143


def test_the_second_ctrl_c_stops_at_once_and_loses_only_what_is_after_the_checkpoint(tmp_path):
    run(tmp_path, "whole", "optimizer=adam")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "parts", "optimizer=adam", listeners=[raising(signal.SIGINT, 7, times=2)])
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt").step == 5
    again(tmp_path, "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    run(tmp_path, "whole", "steps=25")
    command = [sys.executable, "-m", "kfac_cli.main", "train", "--json", "--out", str(tmp_path / "killed")]
    more = ["steps=1000000", "checkpoint.every=5"]  # it cannot end before it is killed
    sets = [part for assignment in settings(tmp_path, *more) for part in ("--set", assignment)]
    code = "import sys; from kfac_cli.main import main; main()"
    command = [sys.executable, "-c", code, *command[3:], *sets]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 13:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
    step = load_checkpoint(tmp_path / "killed" / "checkpoint.pt").step
    assert step >= 10
    assert step % 5 == 0
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # as torn as a kill can leave it
    steps = max(25, step)  # the process may have run on before the signal reached it
    again(tmp_path, "killed", f"steps={steps}")
    if steps > 25:
        again(tmp_path, "whole", f"steps={steps}")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", steps)


def test_a_finished_run_can_be_finished_again(tmp_path):
    first = run(tmp_path, "a", "optimizer=adam")
    second = again(tmp_path, "a")
    assert second.measures == first.measures
    assert second.step == 20
    assert [event["event"] for event in events_of(tmp_path / "a")].count("done") == 1


def test_steps_below_those_taken_are_refused(tmp_path):
    run(tmp_path, "a", "optimizer=adam")
    with pytest.raises(ConfigError, match="already taken 20 steps"):
        again(tmp_path, "a", "steps=10")


def test_changed_data_is_refused(tmp_path):
    run(tmp_path, "a", "optimizer=adam")
    write_data(tmp_path, x_test=np.zeros((20, 16), dtype=np.float32))
    with pytest.raises(DataError, match="the data has changed"):
        again(tmp_path, "a", "steps=30")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    run(tmp_path, "a", "optimizer=adam")
    run(tmp_path, "b", "optimizer=adam", "problem.sizes=[7, 3, 7]")
    (tmp_path / "a" / "checkpoint.pt").write_bytes((tmp_path / "b" / "checkpoint.pt").read_bytes())
    with pytest.raises(DataError, match="does not fit the run's configuration"):
        again(tmp_path, "a", "steps=30")


def test_a_corrupt_checkpoint_is_named(tmp_path):
    run(tmp_path, "a", "optimizer=adam")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"checkpoint.pt cannot be read"):
        again(tmp_path, "a", "steps=30")


def test_corrupt_metrics_are_named(tmp_path):
    run(tmp_path, "a", "optimizer=adam")
    (tmp_path / "a" / "metrics.jsonl").write_text("garbage\n")
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged: line 1"):
        again(tmp_path, "a", "steps=30")


def test_other_threads_are_reported_on_resuming(tmp_path, caplog):
    run(tmp_path, "a", "optimizer=adam")
    with caplog.at_level(logging.WARNING, logger="kfacore.lab.training"):
        again(tmp_path, "a", "threads=2")
    assert "resumed with threads 2, started with threads 1" in caplog.text


@pytest.mark.parametrize("every", [0, 3])
def test_intervals(tmp_path, every):
    run(tmp_path, "a", "optimizer=adam", "steps=7", f"eval.every={every}", f"checkpoint.every={every}")
    steps = [0, 3, 6, 7]
    evals = [event["step"] for event in events_of(tmp_path / "a", "eval")]
    assert evals == (steps if every else [7])
    assert [event["step"] for event in events_of(tmp_path / "a", "checkpoint")] == (steps if every else [0, 7])


def test_early_evaluations_come_before_the_first_interval(tmp_path):
    run(tmp_path, "a", "optimizer=adam", "steps=13", "eval.every=12", "eval.early=true")
    assert [event["step"] for event in events_of(tmp_path / "a", "eval")] == [0, 1, 2, 5, 10, 12, 13]


def test_a_step_that_raised_the_objective_is_kept_in_the_events(tmp_path, monkeypatch):
    def scalars(report):
        return {**read_scalars(report), "rho": {2: -math.inf, 4: math.nan}.get(report.step, 0.5)}

    monkeypatch.setattr("kfacore.lab.training.loop.read_scalars", scalars)
    run(tmp_path, "a", "optimizer=adam", "steps=4")
    steps = events_of(tmp_path / "a", "step")
    assert [event["rho"] for event in steps] == [0.5, None, 0.5, None]
    assert [event.get("increased") for event in steps] == [None, True, None, None]


def test_without_average_and_test_set(tmp_path):
    x = np.random.default_rng(0).random((30, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x_train=x)
    result = run(tmp_path, "a", "optimizer=adam", "averaging.decay=0.0")
    assert {key for key in EVAL_KEYS if result.measures[key] is not None} == {"train_loss", "train_error"}
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt").averaged is None
    assert set(KEYS) < set(result.measures)


def test_init_is_where_training_starts(tmp_path):
    run(tmp_path, "a", "optimizer=adam", "steps=5")
    state = load_checkpoint(tmp_path / "a" / "checkpoint.pt").model
    np.savez(tmp_path / "p.npz", **{name: value.numpy() for name, value in state.items()})
    run(tmp_path, "b", "optimizer=adam", "steps=1", init=tmp_path / "p.npz")
    after, before = events_of(tmp_path / "a", "eval")[-1], events_of(tmp_path / "b", "eval")[0]
    assert before["step"] == 0
    assert before["train_loss"] == after["train_loss"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["init"]["file"] == "p.npz"


def test_double_precision(tmp_path):
    run(tmp_path, "a", "dtype=float64", "steps=3")
    state = load_checkpoint(tmp_path / "a" / "checkpoint.pt").model
    assert {value.dtype for value in state.values()} == {torch.float64}


def test_seeds_change_the_run(tmp_path):
    run(tmp_path, "a", "optimizer=adam", "steps=2")
    run(tmp_path, "b", "optimizer=adam", "steps=2", "seed=1")
    assert events_of(tmp_path / "a", "step") != events_of(tmp_path / "b", "step")


class TestFailures:
    def test_divergence_keeps_the_last_good_checkpoint(self, tmp_path):
        with pytest.raises(NumericalError) as caught:
            run(tmp_path, "a", "optimizer=sgd", "optimizer.lr=1e36", "checkpoint.every=1", "eval.every=0")
        message = str(caught.value)
        assert caught.value.exit_code == 3
        assert "step" in message
        assert "smaller learning rate" in message
        assert str(tmp_path / "a") in message
        kept = load_checkpoint(tmp_path / "a" / "checkpoint.pt")
        assert f"checkpoint of step {kept.step} is kept" in message
        assert all(bool(value.isfinite().all()) for value in kept.model.values())
        assert events_of(tmp_path / "a")[-1]["step"] >= kept.step

    def test_a_loss_that_is_not_finite_names_the_step_and_is_written_as_null(self, tmp_path):
        with pytest.raises(NumericalError, match=r"the loss of step \d+ is (nan|inf) \(lambda none, gamma none\)"):
            run(tmp_path, "a", "optimizer=sgd", "optimizer.lr=1e36", "checkpoint.every=0", "eval.every=0")
        assert events_of(tmp_path / "a", "step")[-1]["loss"] is None

    def test_bad_data_leaves_no_folder(self, tmp_path):
        x = np.full((10, 16), np.nan, dtype=np.float32)
        np.savez(tmp_path / "data.npz", x_train=x)
        with pytest.raises(DataError, match="NaN"):
            run(tmp_path, "a")
        assert not (tmp_path / "a").exists()

    def test_targets_that_the_likelihood_refuses(self, tmp_path):
        np.savez(tmp_path / "data.npz", x_train=np.full((10, 16), 2.0, dtype=np.float32))
        with pytest.raises(DataError):
            run(tmp_path, "a", "likelihood=bernoulli")

    @pytest.mark.parametrize("device", ["meta", "cuda:77", "nonsense"])
    def test_unusable_devices(self, tmp_path, device):
        with pytest.raises(ConfigError, match=rf"device '{device}' cannot be used"):
            run(tmp_path, "a", f'device="{device}"')

    def test_a_full_disk_stops_the_run_and_loses_nothing(self, tmp_path):
        run(tmp_path, "whole", "optimizer=adam")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill(event):
            if event["event"] == "step" and event["step"] == 8:
                size = (tmp_path / "parts" / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 800, before[1]))  # no room for a checkpoint

        try:
            with pytest.raises(ResourceError) as caught:
                run(tmp_path, "parts", "optimizer=adam", listeners=[fill])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "the checkpoint of step 5 is intact" in str(caught.value)
        assert f"kfac train --resume {tmp_path / 'parts'}" in str(caught.value)
        assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt").step == 5
        assert not [p for p in os.listdir(tmp_path / "parts") if p.endswith(".tmp")]
        again(tmp_path, "parts")
        assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)

    def test_a_closed_pipe_goes_through(self, tmp_path):
        def closed(event):
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            run(tmp_path, "a", "optimizer=adam", listeners=[closed])


class TestReadScalars:
    def test_one_transfer(self, monkeypatch):
        reads = []
        original = torch.Tensor.tolist

        def counting(tensor):
            reads.append(tensor.shape)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counting)
        for name in ("item", "__float__", "__bool__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("another transfer"))
        report = StepReport(
            step=1,
            batch_size=2,
            loss=torch.tensor(1.5),
            objective=torch.tensor(2.5, dtype=torch.float64),
            error=torch.tensor([0.5]),
            rho=torch.tensor(float("-inf"), dtype=torch.float64),
        )
        values = read_scalars(report)
        assert reads == [torch.Size([4])]
        assert values == {
            "loss": 1.5, "objective": 2.5, "error": 0.5, "rho": float("-inf"),
            "lam": None, "gamma": None, "alpha": None, "mu": None,
        }  # fmt: skip
