"""Whether a run got better: the verdict, the best checkpoint beside the last, what is said of one that got worse."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from small_runs import events_of, run

from kfacore.errors import DataError, NumericalError
from kfacore.lab.training.checkpoint import load_best, load_checkpoint
from kfacore.lab.training.loop import train
from kfacore.lab.training.outcome import Losses, remedy, verdict
from kfacore.lab.training.progress import Progress
from kfacore.lab.training.results import read_scalars
from kfacore.lab.training.resume import resume_config
from kfacore.lab.training.run import RunFolder
from kfacore.lab.training.signals import Interrupted
from kfacore.registry import get_registry
from kfacore.roles import StepReport


@pytest.mark.parametrize(
    ("first", "best", "last", "expected"),
    [
        (4.0, 0.5, 0.5, "fine"),
        (4.0, 0.5, 1.0, "fine"),  # twice the best
        (4.0, 0.5, 1.003, "fine"),  # and less than a thousandth of the first above that
        (4.0, 0.5, 1.005, "diverged"),
        (2.3, 1e-9, 0.002, "fine"),  # from next to nothing to next to nothing
        (2.3, 1e-9, 0.0024, "diverged"),
        (4.0, 3.9, 4.0, "fine"),
        (4.0, 3.9, 6.0, "fine"),  # half above the first
        (4.0, 3.9, 6.01, "diverged"),
        (4.0, 0.3, 34020.0, "diverged"),
        (4.0, 4.0, 4.0, "fine"),
        (0.0, 0.0, 0.0, "fine"),
        (0.0, 0.0, 1e-9, "diverged"),
        (-1.0, -5.0, -4.0, "fine"),  # log-densities may be above 1
        (-1.0, -5.0, 0.1, "diverged"),
        (4.0, 0.5, math.nan, "diverged"),
        (4.0, 0.5, math.inf, "diverged"),
        (math.inf, 3.0, 3.0, "fine"),
        (math.nan, 3.0, 7.0, "diverged"),
        (None, 3.0, 3.0, "fine"),
        (None, None, None, "fine"),
        (4.0, 4.0, None, "fine"),
    ],
)
def test_verdict(first, best, last, expected):
    assert verdict(first, best, last) == expected


def losses_of(*values):
    found = Losses()
    for step, value in enumerate(values):
        found = found.after(10 * step, value)
    return found


def test_losses_follow_the_evaluations():
    found = losses_of(3.0, 1.0, math.nan, 2.5)
    assert (found.first, found.best, found.best_step, found.last, found.last_step) == (3.0, 1.0, 10, 2.5, 30)
    assert str(found) == "first 3, best 1 (step 10), last 2.5"
    assert found.verdict == "diverged"
    assert str(Losses()) == "first -, best -, last -"
    assert Losses.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_losses_are_read_from_events_where_null_is_not_finite():
    events = [{"event": "eval", "step": 0, "train_loss": 3.0}, {"event": "step", "step": 1, "loss": 9.0}]
    assert Losses.of(events) == losses_of(3.0)
    found = Losses.of([*events, {"event": "eval", "step": 1, "train_loss": None}])
    assert (found.best, found.verdict) == (3.0, "diverged")


@pytest.mark.parametrize(
    ("options", "lambdas", "gamma", "expected"),
    [
        ({"damping": {"lambda0": None}}, (0.002, 1e-5), 0.1, "a larger damping, --set damping.lambda0=0.02"),
        ({"damping": {"lambda0": None}}, (1e-5, 0.002), 0.1, "a larger damping, --set damping.lambda0=0.02"),
        ({"damping": {"lambda0": 1.0}}, (None, math.nan), None, "a stronger damping or a smaller learning rate"),
        ({"damping": {"lambda0": 0.0, "gamma": None}}, (0.0, 0.0), 0.1, "a larger damping, --set damping.gamma=1"),
        ({"optimizer": {"lr": 0.01}}, (None,), None, "a smaller learning rate, --set optimizer.lr=0.001"),
        ({"optimizer": {"kind": "own"}}, (None, None), None, "a stronger damping or a smaller learning rate"),
    ],
)  # fmt: skip
def test_remedy_names_a_value(options, lambdas, gamma, expected):
    assert remedy(options, lambdas, gamma) == expected


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that find the losses of a list, by step; a run evaluates every 5 steps."""

    def script(*losses):
        values = dict(enumerate(losses))
        keys = [f"{p}{s}_{k}" for p in ("", "averaged_") for s in ("train", "test") for k in ("loss", "error")]
        count = iter(range(len(losses)))

        def evaluate(*_, **__):
            return {**dict.fromkeys(keys), "train_loss": values[next(count)], "train_error": 1.0}

        monkeypatch.setattr("kfacore.lab.training.loop.evaluate_all", evaluate)

    return script


def parameters_at(folder, step):
    """Those of the same run, ended at a step."""
    name = f"until-{step}"
    run(folder, name, "optimizer=adam", f"steps={step}")
    return load_checkpoint(folder / name / "checkpoint.pt").model


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_best_parameters_are_kept_beside_the_last(tmp_path, scripted):
    scripted(3.0, 2.0, 1.0, 1.5, 1.2)
    result = run(tmp_path, "a", "optimizer=adam")
    assert result.verdict == "fine"
    assert result.best == tmp_path / "a" / "checkpoint-best.pt"
    assert str(result.losses) == "first 3, best 1 (step 10), last 1.2"
    best = load_best(result.best)
    assert (best.step, best.train_loss) == (10, 1.0)
    scripted(3.0, 2.0, 1.0)
    assert equal(best.model, parameters_at(tmp_path, 10))
    assert not equal(best.model, load_checkpoint(tmp_path / "a" / "checkpoint.pt").model)
    done = events_of(tmp_path / "a")[-1]
    assert (done["verdict"], done["best"]) == ("fine", str(result.best))
    assert done["losses"] == result.losses.as_dict()
    assert "advice" not in done


def test_without_anything_better_than_the_start_there_is_no_best_file(tmp_path, scripted):
    scripted(3.0, 3.5, 3.2, 3.1, 5.1)
    result = run(tmp_path, "a", "optimizer=adam")
    assert (result.verdict, result.best) == ("diverged", None)
    assert not RunFolder(tmp_path / "a").best_file.exists()
    with pytest.raises(DataError, match="no evaluation of the run was better than its start"):
        load_best(RunFolder(tmp_path / "a").best_file)


def test_a_run_that_got_worse_says_so_and_what_to_try(tmp_path, scripted):
    scripted(3.0, 0.5, 1.0, 2.0, 4.0)
    result = run(tmp_path, "a")
    assert result.verdict == "diverged"
    first, *_, last = (event["lam"] for event in events_of(tmp_path / "a", "step"))
    assert result.advice == f"a larger damping, --set damping.lambda0={10 * max(first, last):.2g}"
    done = events_of(tmp_path / "a")[-1]
    assert (done["verdict"], done["advice"]) == ("diverged", result.advice)


def again(folder, name, *more):
    return train(resume_config(get_registry(), folder / name, sets=more), registry=get_registry(), resume=folder / name)


def test_a_resumed_run_remembers_first_and_best(tmp_path, scripted):
    def stop(event):
        if event["event"] == "step" and event["step"] == 11:
            signal.raise_signal(signal.SIGINT)

    scripted(3.0, 1.0, 2.0)
    with pytest.raises(Interrupted):
        run(tmp_path, "a", "optimizer=adam", listeners=[stop])
    before = (tmp_path / "a" / "checkpoint-best.pt").read_bytes()
    scripted(1.9, 1.8)
    result = again(tmp_path, "a")
    assert str(result.losses) == "first 3, best 1 (step 5), last 1.8"
    assert (tmp_path / "a" / "checkpoint-best.pt").read_bytes() == before
    scripted(0.5)
    result = again(tmp_path, "a", "steps=22")
    assert str(result.losses) == "first 3, best 0.5 (step 22), last 0.5"
    assert load_best(result.best).step == 22


def test_a_best_file_newer_than_the_last_checkpoint_counts(tmp_path, scripted):
    """The process was killed between the two: the steps are taken again, perhaps with fewer evaluations."""
    scripted(3.0, 2.0)
    run(tmp_path, "a", "optimizer=adam", "steps=5")
    scripted(3.0, 2.0, 1.0)
    run(tmp_path, "b", "optimizer=adam", "steps=10")
    (tmp_path / "a" / "checkpoint-best.pt").write_bytes((tmp_path / "b" / "checkpoint-best.pt").read_bytes())
    scripted(1.5)
    result = again(tmp_path, "a", "steps=11", "eval.every=0")
    assert str(result.losses) == "first 3, best 1 (step 10), last 1.5"


def test_checkpoints_of_versions_that_kept_no_losses_go_on(tmp_path, scripted):
    scripted(3.0, 2.0, 1.0, 1.5, 1.2)
    run(tmp_path, "a", "optimizer=adam")
    file = tmp_path / "a" / "checkpoint.pt"
    content = torch.load(file, weights_only=True)
    del content["progress"]
    torch.save(content, file)
    (tmp_path / "a" / "checkpoint-best.pt").unlink()
    assert load_checkpoint(file).progress == {}
    assert str(again(tmp_path, "a").losses) == "first 3, best 1 (step 10), last 1.2"


def test_training_starts_from_a_best_checkpoint(tmp_path, scripted):
    scripted(3.0, 2.0, 1.0, 1.5, 1.2)
    best = run(tmp_path, "a", "optimizer=adam").best
    scripted(1.0, 1.0)
    run(tmp_path, "b", "optimizer=sgd", "optimizer.lr=1e-30", "steps=1", init=best)
    assert equal(load_checkpoint(tmp_path / "b" / "checkpoint.pt").model, load_best(best).model)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["init"]["file"] == "checkpoint-best.pt"


class TestNumericalFailures:
    def test_names_a_value_and_what_is_kept(self, tmp_path, scripted):
        scripted(3.0, 1.0, math.nan)
        with pytest.raises(NumericalError) as caught:
            run(tmp_path, "a", "optimizer=adam")
        message = str(caught.value)
        assert message.startswith("the training loss after step 10 is nan; try a smaller learning rate")
        assert "--set optimizer.lr=0.0001" in message
        assert f"the checkpoint of step 5 is kept in {tmp_path / 'a'}" in message
        best = tmp_path / "a" / "checkpoint-best.pt"
        assert message.endswith(f"the parameters with the smallest training loss (1, step 5) in {best}")
        ended = events_of(tmp_path / "a")[-1]
        assert ended == {"event": "diverged", "step": 10, "reason": message}

    def test_the_end_is_taken_back_by_a_resumed_run(self, tmp_path, scripted):
        scripted(3.0, 1.0, math.nan)
        with pytest.raises(NumericalError):
            run(tmp_path, "a", "optimizer=adam")
        scripted(0.9, 0.8, 0.7)
        again(tmp_path, "a")
        assert "diverged" not in [event["event"] for event in events_of(tmp_path / "a")]

    def test_a_part_that_names_a_value_is_not_contradicted(self, tmp_path):
        error = NumericalError("step 3: x; try --set damping.lambda0=7")
        said = Progress(Losses(), 0, 1.0, 1.0).explain(error, 2, None, RunFolder(tmp_path), {"damping": {"lambda0": 1}})
        assert str(said) == str(error)


class TestUndoneSteps:
    @pytest.mark.parametrize(
        ("accepted", "undone"),
        [(True, None), (False, 1.0), (None, None), (torch.tensor(True), None), (torch.tensor(False), 1.0)],
    )
    def test_reports_with_and_without_the_field(self, accepted, undone):
        report = StepReport(1, 2, *(torch.tensor(value) for value in (1.5, 2.5, 0.5)))
        assert "undone" not in read_scalars(report)
        object.__setattr__(report, "accepted", accepted)  # as optimizers have it that undo steps
        assert read_scalars(report).get("undone") == undone

    def test_are_written_and_counted_over_the_lives_of_a_run(self, tmp_path, scripted, monkeypatch):
        def scalars(report):
            return {**read_scalars(report), **({"undone": 1.0} if report.step in (2, 3, 7) else {})}

        monkeypatch.setattr("kfacore.lab.training.loop.read_scalars", scalars)
        scripted(3.0, 2.0)
        assert run(tmp_path, "a", "optimizer=adam", "steps=5").rejected == 2
        scripted(1.0, 1.0)
        seen = []
        config = resume_config(get_registry(), tmp_path / "a", sets=["steps=8"])
        result = train(config, registry=get_registry(), resume=tmp_path / "a", listeners=[seen.append])
        assert result.rejected == 3
        assert seen[0]["rejected"] == 2
        assert seen[-1]["rejected"] == 3
        assert [e["step"] for e in events_of(tmp_path / "a", "step") if e.get("rejected")] == [2, 3, 7]
