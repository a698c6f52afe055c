"""The runner with an executor that executes runs in this very process, so that what it decides is seen at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import events_of
from small_studies import write_study

from kfacore.errors import ResourceError
from kfacore.lab.studies.claims import Claim
from kfacore.lab.studies.config import read_study
from kfacore.lab.studies.folder import plan_into
from kfacore.lab.studies.plan import load_study
from kfacore.lab.studies.runner import StudyResult, run_study
from kfacore.lab.studies.state import RunState, own_plan, read_journal, read_state, state_folder, write_outcome
from kfacore.lab.studies.worker import _read_planned
from kfacore.registry import get_registry

INLINE = """
    from typing import Literal
    from kfacore.plugin import Component, ExecutorConfig, OptimizerConfig, hookimpl

    class InlineConfig(ExecutorConfig):
        kind: Literal["inline"] = "inline"

    class WeakConfig(OptimizerConfig):
        kind: Literal["weak"] = "weak"

    @hookimpl
    def kfac_components():
        return [
            Component("executor", "inline", InlineConfig, "inline_parts:Inline", "In this process."),
            Component("optimizer", "weak", WeakConfig, "inline_parts:Weak", "Breaks."),
        ]
"""

PARTS = '''
from inline_exec import InlineConfig
from kfacore.roles import Ended, Executor, Optimizer
from kfacore.lab.studies.worker import execute


class Inline(Executor):
    """Executes a run when it is asked how the runs are."""

    Config = InlineConfig
    calls = []
    codes = {}  # what a process that cannot speak for itself would leave behind, by run

    def open(self, study, *, threads):
        self.study, self.waiting = study, []
        self.calls.append(("open", threads))

    def submit(self, run):
        self.waiting.append(run)
        self.calls.append(("submit", run))

    def poll(self, timeout):
        waiting, self.waiting = self.waiting, []
        ended = []
        for run in waiting:
            fate = self.codes.get(run)
            if fate is None:
                fate = execute(self.study, run)
            ended.append(fate if isinstance(fate, Ended) else Ended(run, fate))
        return ended

    def stop(self):
        self.calls.append(("stop",))
        self.waiting = []

    def close(self):
        self.calls.append(("close",))


class Weak(Optimizer):
    @classmethod
    def for_run(cls, config, **parts):
        raise RuntimeError("it broke\\nbadly")

    def step(self, inputs, targets): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...
'''


@pytest.fixture
def inline(install_plugin):
    module = install_plugin("inline_exec", INLINE)
    (module.parent / "inline_parts.py").write_text(PARTS, encoding="utf-8")
    import inline_parts

    return inline_parts.Inline


def go(tmp_path: Path, file: Path, *sets: str, **options: Any) -> tuple[StudyResult, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    config = read_study(file, sets=["executor=inline", *sets])
    result = run_study(get_registry(), config, tmp_path / "out", listeners=[seen.append], **options)
    return result, seen


def submitted(inline: Any) -> list[str]:
    return [call[1] for call in inline.calls if call[0] == "submit"]


ONE_BAD = """
[[variants]]
name = "good"
[[variants]]
name = "explodes"
optimizer = { kind = "sgd", lr = 1e30 }
weight_decay = 1e-5
[[variants]]
name = "breaks"
optimizer = "weak"
[[variants]]
name = "late"
approx = "tridiag"
"""


def test_a_study_from_start_to_end_and_nothing_twice(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1)
    result, seen = go(tmp_path, file, "executor={kind='inline', workers=2}")
    assert result.complete
    assert result.failures == ()
    study = load_study(tmp_path / "out")
    assert study.counts()["done"] == 4
    assert json.loads(study.index_file.read_text()) == [run.as_entry() for run in study.runs]
    assert [event["event"] for event in seen].count("started") == 4
    assert [event["event"] for event in seen if event["event"] not in ("started", "ended", "progress")] == [
        "study", "done",
    ]  # fmt: skip
    assert inline.calls[0] == ("open", 1)
    assert inline.calls[-1] == ("close",)
    for run in study.runs:
        manifest = json.loads((run.path / "manifest.json").read_text())
        assert manifest["study"] == {
            "study": "tiny", "variant": run.variant, "problem": "npz", "seed": 0, "shared_machine": False,
        }  # fmt: skip
        assert manifest["threads"] == 1
        assert {"config.json", "manifest.json", "metrics.jsonl", "checkpoint.pt"} <= set(os.listdir(run.path))
    inline.calls.clear()
    again, _ = go(tmp_path, file)
    assert again.complete
    assert inline.calls == []
    # More seeds: only the new runs are executed. The first runner's index is replaced.
    more, _ = go(tmp_path, file, "seeds=2")
    assert more.complete
    assert len(submitted(inline)) == 4
    assert load_study(tmp_path / "out").counts()["done"] == 8


def test_one_bad_run_is_told_with_its_reason_and_the_rest_go_on(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body=ONE_BAD)
    result, seen = go(tmp_path, file)
    assert not result.complete
    ends = {event["variant"]: (event["state"], event["reason"]) for event in seen if event["event"] == "ended"}
    assert ends["good"] == ("done", "")
    assert ends["late"] == ("done", "")
    assert ends["explodes"][0] == "diverged"
    assert "the loss of step 3 is nan" in ends["explodes"][1]
    assert str(tmp_path) not in ends["explodes"][1], "reasons stand in reports, which are passed on"
    assert "is kept in runs/" in ends["explodes"][1]
    assert ends["breaks"][0] == "failed"
    assert ends["breaks"][1].startswith("RuntimeError: it broke (traceback in state/")
    broken = result.study.of("breaks")[0]
    assert "it broke\nbadly" in (state_folder(tmp_path / "out", broken.hash) / "traceback.txt").read_text()
    assert [run.variant for run in result.failures] == ["explodes", "breaks"]
    # Failed runs stay failed, and are tried again on request; diverged ones would diverge again.
    inline.calls.clear()
    go(tmp_path, file)
    assert submitted(inline) == []
    again, _ = go(tmp_path, file, retry_failed=True)
    assert submitted(inline) == [broken.hash]
    assert [run.state for run in again.study.runs] == ["done", "diverged", "failed", "done"]


FAILING = """
    from typing import Literal
    from kfacore.plugin import Component, hookimpl
    from kfac_plugins.approx import BlockDiagonalConfig

    class TurningConfig(BlockDiagonalConfig):
        kind: Literal["turning"] = "turning"
        how: Literal["shape", "raises", "nan"] = "shape"

    @hookimpl
    def kfac_components():
        return [Component("approx", "turning", TurningConfig, "turning_parts:Turning", "Fails after some uses.")]
"""

TURNING = """
from kfac_plugins.approx.blockdiag import BlockDiagonal
from turning_plugin import TurningConfig


class Turning(BlockDiagonal):
    Config = TurningConfig
    uses = 0

    def factorise(self, moments):
        made = super().factorise(moments)
        damped = made.damped

        def spoiled(gamma, *, pi="layer"):
            inverse = damped(gamma, pi=pi)
            solve = inverse.solve

            def solve_into(blocks, out):
                self.uses += 1
                found = solve(blocks)
                if self.uses > 2:
                    found = self.spoil(found)
                for layer, own, to in zip(inverse.layers, found, out, strict=True):
                    if own.shape != to.shape:
                        raise ValueError(f"{tuple(own.shape)} for the block {layer.name}")
                    to.copy_(own)

            inverse.solve_into = solve_into
            return inverse

        made.damped = spoiled
        return made

    def spoil(self, found):
        if self.config.how == "raises":
            raise ZeroDivisionError("by nothing")
        return [found[0], found[1].mT if self.config.how == "shape" else found[1] * float("nan"), *found[2:]]
"""

PLUGGED = """
[[variants]]
name = "good"
[[variants]]
name = "shape"
approx = { kind = "turning", how = "shape" }
[[variants]]
name = "raises"
approx = { kind = "turning", how = "raises" }
[[variants]]
name = "nan"
approx = { kind = "turning", how = "nan" }
trust = "none"
[[variants]]
name = "late"
approx = "tridiag"
"""


def test_a_plug_in_that_fails_while_it_runs_is_named_and_the_rest_go_on(tmp_path, inline, install_plugin) -> None:
    module = install_plugin("turning_plugin", FAILING, version="3.1")
    (module.parent / "turning_parts.py").write_text(TURNING, encoding="utf-8")
    result, seen = go(tmp_path, write_study(tmp_path, steps=6, seeds=1, body=PLUGGED))
    ends = {event["variant"]: (event["state"], event["reason"]) for event in seen if event["event"] == "ended"}
    assert [name for name, (state, _) in ends.items() if state == "done"] == ["good", "late"]
    for name, wanted in (("shape", "for the block 2"), ("raises", "the blocks 0, 2"), ("nan", "made NaN or infinity")):
        assert "approx 'turning' (turning_parts.Turning, turning-plugin 3.1)" in ends[name][1]
        assert wanted in ends[name][1]
        assert read_state(tmp_path / "out", result.study.of(name)[0].hash).reason == ends[name][1]
    assert "ZeroDivisionError: by nothing" in ends["raises"][1]
    # An error is a failure, whoever made it; numbers that are not finite end a run as everywhere, and say whose.
    assert {name: ends[name][0] for name in ("shape", "raises", "nan")} == {
        "shape": "failed", "raises": "failed", "nan": "diverged",
    }  # fmt: skip
    assert "2: " in ends["nan"][1]
    assert [run.variant for run in result.failures] == ["shape", "raises", "nan"]


WORSE = """
[[variants]]
name = "good"
[[variants]]
name = "worse"
optimizer = { kind = "adam", lr = 3.0 }
"""


def test_a_run_that_got_worse_has_diverged_and_keeps_its_numbers(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=4, seeds=1, body=WORSE)
    result, _ = go(tmp_path, file)
    good, worse = result.study.runs
    assert (good.state, worse.state) == ("done", "diverged")
    assert worse.reason.startswith("it got worse: training loss first ")
    assert result.failures == (worse,)
    assert events_of(worse.path)[-1]["verdict"] == "diverged"
    # Killed between its end and the writing of its outcome: the events say the same.
    (state_folder(tmp_path / "out", worse.hash) / "outcome.json").unlink()
    again, _ = go(tmp_path, file)
    assert again.study.runs[1].reason == worse.reason


def test_fail_fast_starts_nothing_more(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body=ONE_BAD)
    result, seen = go(tmp_path, file, fail_fast=True)
    assert [run.state for run in result.study.runs] == ["done", "diverged", "pending", "pending"]
    assert ("stop",) in inline.calls
    assert "stopping" in [event["event"] for event in seen]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "killed by SIGKILL: by the system for lack of memory, or by hand"),
        (-11, "killed by SIGSEGV"),
        (1, "exit code 1 and without a word"),
    ],
)
def test_a_process_that_died_without_a_word(tmp_path, inline, code, reason) -> None:
    file = write_study(tmp_path, steps=3, seeds=2, body="")
    plan = go(tmp_path, file, "seeds=[0]")[0].study
    shutil.rmtree(tmp_path / "out")
    inline.codes[plan.runs[0].hash] = code
    try:
        result, _ = go(tmp_path, file)
    finally:
        inline.codes.clear()
    assert [run.state for run in result.study.runs] == ["failed", "done"]
    assert reason in result.study.runs[0].reason
    assert "log.txt" in result.study.runs[0].reason
    again, _ = go(tmp_path, file, retry_failed=True)
    assert again.complete


def test_a_run_that_never_ends_is_given_up(tmp_path, inline) -> None:
    from kfacore.roles import Ended

    file = write_study(tmp_path, steps=3, seeds=1, body="")
    name = go(tmp_path, file)[0].study.runs[0].hash
    shutil.rmtree(tmp_path / "out")
    inline.calls.clear()
    inline.codes[name] = Ended(name, None, "preempted", again=True)
    try:
        result, _ = go(tmp_path, file)
    finally:
        inline.codes.clear()
    assert submitted(inline) == [name] * 3
    assert "started 3 times and never ended: preempted" in result.study.runs[0].reason


class TestWhatIsThereOfARun:
    @pytest.fixture
    def finished(self, tmp_path, inline):
        file = write_study(tmp_path, steps=4, seeds=1, body="")
        result, _ = go(tmp_path, file)
        run = result.study.runs[0]
        before = events_of(run.path, "step", "eval")
        (state_folder(tmp_path / "out", run.hash) / "outcome.json").unlink()
        return file, run, before

    def what(self, tmp_path: Path, run: Any) -> list[str]:
        return [line["what"] for line in read_journal(tmp_path / "out", run.hash)]

    def test_all_but_the_outcome(self, tmp_path, finished) -> None:
        file, run, _ = finished
        stamp = (run.path / "checkpoint.pt").stat().st_mtime_ns
        assert go(tmp_path, file)[0].complete
        assert self.what(tmp_path, run) == ["started", "done"], "nothing is trained, and an end is told once"
        assert (run.path / "checkpoint.pt").stat().st_mtime_ns == stamp

    def test_no_checkpoint_yet(self, tmp_path, finished) -> None:
        file, run, before = finished
        (run.path / "checkpoint.pt").unlink()
        assert go(tmp_path, file)[0].complete
        assert self.what(tmp_path, run) == ["started", "done", "started", "done"]
        assert events_of(run.path, "step", "eval") == before

    def test_a_checkpoint_and_a_torn_line(self, tmp_path, finished) -> None:
        file, run, before = finished
        metrics = run.path / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True)
        metrics.write_bytes(b"".join(lines[:-1]) + lines[-1][:10])
        assert go(tmp_path, file)[0].complete
        assert self.what(tmp_path, run) == ["started", "done", "resumed", "done"]
        assert events_of(run.path, "step", "eval") == before

    def test_a_damaged_checkpoint(self, tmp_path, finished) -> None:
        file, run, _ = finished
        (run.path / "checkpoint.pt").write_bytes(b"half")
        (run.path / "metrics.jsonl").write_text("")
        result, _ = go(tmp_path, file)
        assert result.study.runs[0].state == "failed"
        assert "cannot be read as a checkpoint" in result.study.runs[0].reason

    def test_another_run_under_this_name(self, tmp_path, finished) -> None:
        file, run, _ = finished
        config = json.loads((run.path / "config.json").read_text())
        (run.path / "config.json").write_text(json.dumps({**config, "seed": 99}))
        result, _ = go(tmp_path, file)
        assert "holds another run than its name says; delete it" in result.study.runs[0].reason

    def test_a_damaged_outcome(self, tmp_path, finished) -> None:
        from kfacore.errors import DataError

        file, run, _ = finished
        (state_folder(tmp_path / "out", run.hash) / "outcome.json").write_text('{"state": "dome"}')
        with pytest.raises(DataError, match=r"outcome.json cannot be read.*delete it"):
            go(tmp_path, file)


def test_a_run_of_another_machine_is_waited_for_and_taken_over_when_it_is_silent(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body="")
    name = go(tmp_path, file)[0].study.runs[0].hash
    shutil.rmtree(tmp_path / "out")
    folder = state_folder(tmp_path / "out", name)
    folder.mkdir(parents=True)
    claim = {"place": "another machine", "pid": 1, "birth": "7", "released": False}
    (folder / "claim-4").write_text(json.dumps(claim))
    assert read_state(tmp_path / "out", name) == RunState("running")
    inline.calls.clear()
    result, _ = go(tmp_path, file, stale_seconds=0.3)
    assert result.complete
    assert submitted(inline) == [name]
    assert sorted(file.name for file in folder.glob("claim-*")) == ["claim-6"]


def test_a_run_that_another_runner_ends_is_told_too(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body="")
    name = go(tmp_path, file)[0].study.runs[0].hash
    shutil.rmtree(tmp_path / "out")
    inline.calls.clear()
    claim = Claim.take(state_folder(tmp_path / "out", name))
    assert claim is not None
    polls = []

    def other_one_ends(self, timeout):
        polls.append(timeout)
        if len(polls) == 2:
            write_outcome(tmp_path / "out", name, RunState("done"))
        return []

    inline.poll, kept = other_one_ends, inline.poll
    try:
        result, seen = go(tmp_path, file)
    finally:
        inline.poll = kept
        claim.release()
    assert result.complete
    assert submitted(inline) == []
    assert [event["state"] for event in seen if event["event"] == "ended"] == ["done"]


def test_runs_that_share_the_machine_are_marked(tmp_path, inline) -> None:
    from kfacore.lab.studies.machine import Presence

    file = write_study(tmp_path, steps=3, seeds=1, body="")
    state_folder(tmp_path / "out", "other").mkdir(parents=True)
    with Presence(tmp_path / "out", "other") as other:
        assert not other.shared
        result, _ = go(tmp_path, file)
        assert other.shared, "the one that was there first is marked as well"
    manifest = json.loads((result.study.runs[0].path / "manifest.json").read_text())
    assert manifest["study"]["shared_machine"] is True
    # A process that is gone shares nothing.
    folder = next((tmp_path / "out" / "machines").iterdir())
    (folder / "dead").write_text(json.dumps([os.getpid(), "1"]))
    with Presence(tmp_path / "out", "alone") as alone:
        assert not (state_folder(tmp_path / "out", "alone") / "shared").exists()
        assert not alone.shared


TUNED = """
[[variants]]
name = "plain"
[[variants]]
name = "sgd"
optimizer = { kind = "sgd", lr = 1.0 }
[variants.tune]
budget.steps = 2
axes.optimizer.lr = [1e30, 1e-4, 1e-2]
axes.optimizer.momentum = [0.0, 0.5]
"""


def test_tuning_comes_first_and_the_best_one_is_taken(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=2, body=TUNED)
    result, seen = go(tmp_path, file)
    assert result.complete, "candidates that diverge are no failures of the study"
    tuned = [event for event in seen if event["event"] == "tuned"]
    assert len(tuned) == 1
    chosen = tuned[0]["chosen"]["optimizer"]
    assert seen[0]["total"] == 10
    assert [run.variant for run in result.study.runs] == ["plain", "plain", "sgd", "sgd"]
    for run in result.study.of("sgd"):
        assert run.config["optimizer"]["lr"] == chosen["lr"]
        assert run.config["optimizer"]["momentum"] == chosen["momentum"]
    # By hand: the smallest error of the last evaluation among the tuning runs that have an end.
    errors = {}
    names = {run.hash for run in result.study.runs}
    for folder in (tmp_path / "out" / "runs").iterdir():
        if folder.name not in names and read_state(tmp_path / "out", folder.name).state == "done":
            config = json.loads((folder / "config.json").read_text())["optimizer"]
            errors[config["lr"], config["momentum"]] = events_of(folder, "eval")[-1]["train_error"]
    assert len(errors) == 4
    assert min(errors, key=errors.__getitem__) == (chosen["lr"], chosen["momentum"])
    study = load_study(tmp_path / "out")
    assert study.variants[1].tuned == {"npz": {"optimizer": chosen}}
    assert len(study.runs) == 4
    inline.calls.clear()
    assert go(tmp_path, file)[0].complete
    assert inline.calls == []
    (tuning,) = plan_into(get_registry(), read_study(file), tmp_path / "out").tunings
    assert [run.state for run in tuning.runs] == [read_state(tmp_path / "out", run.hash).state for run in tuning.runs]
    assert {run.state for run in tuning.runs} == {"done", "diverged"}, "a dry run shows what is left"


def test_a_variant_whose_tuning_failed_is_lost_and_said(tmp_path, inline) -> None:
    body = TUNED.replace("[1e30, 1e-4, 1e-2]", "[1e30]")
    file = write_study(tmp_path, steps=3, seeds=1, body=body)
    for _ in range(2):  # the second time nothing is left to run, and it is no less lost
        result, seen = go(tmp_path, file)
        assert result.lost == (("sgd", "npz"),)
        assert not result.complete
        assert [run.variant for run in result.study.runs] == ["plain"]
        assert [event["chosen"] for event in seen if event["event"] == "tuned"] == [None]


@pytest.mark.parametrize("change", ["measure", "choice deleted", "grid"])
def test_a_choice_is_made_again_although_no_tuning_run_is_left(tmp_path, inline, change) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body=TUNED)
    assert go(tmp_path, file)[0].complete
    if change == "measure":
        file.write_text(file.read_text().replace("[variants.tune]", '[variants.tune]\nmeasure = "train_loss"'))
    elif change == "grid":
        file.write_text(file.read_text().replace("[1e30, 1e-4, 1e-2]", "[1e-4, 1e-2]"))
    else:
        (tmp_path / "out" / "tuning.json").unlink()
    result, seen = go(tmp_path, file)
    assert result.complete
    assert [event["chosen"] is None for event in seen if event["event"] == "tuned"] == [False]
    assert [run.variant for run in result.study.runs] == ["plain", "sgd"]


def test_tuning_may_choose_what_another_variant_has(tmp_path, inline) -> None:
    same = '[[variants]]\nname = "sgd as it is"\noptimizer = { kind = "sgd", lr = 0.01, momentum = 0.5 }\n'
    body = same + TUNED.replace("[1e30, 1e-4, 1e-2]", "[0.01]").replace("[0.0, 0.5]", "[0.5]")
    result, _ = go(tmp_path, write_study(tmp_path, steps=3, seeds=1, body=body))
    assert result.complete
    hashes = {run.variant: run.hash for run in result.study.runs}
    assert hashes["sgd"] == hashes["sgd as it is"]


def test_a_tuning_run_that_crashed_counts_and_a_retry_chooses_again(tmp_path, inline) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body=TUNED)
    (tuning,) = plan_into(get_registry(), read_study(file), tmp_path / "out").tunings
    best = tuning.runs[-1]
    state_folder(tmp_path / "out", best.hash).mkdir(parents=True)
    write_outcome(tmp_path / "out", best.hash, RunState("failed", "killed by SIGKILL"))
    result, _ = go(tmp_path, file)
    assert [(run.hash, run.state) for run in result.failures] == [(best.hash, "failed")]
    assert not result.complete
    without = result.study.variants[1].tuned
    result, seen = go(tmp_path, file, retry_failed=True)
    assert result.complete
    (chosen,) = [event["chosen"] for event in seen if event["event"] == "tuned"]
    assert result.study.variants[1].tuned == {"npz": chosen}
    assert {"npz": chosen} != without, "the last of the grid is the best here"


def test_tuning_before_there_are_averaged_parameters_looks_at_the_current_ones(tmp_path, inline) -> None:
    body = TUNED.replace("[variants.tune]", '[variants.tune]\nmeasure = "averaged_train_error"')
    result, _ = go(tmp_path, write_study(tmp_path, steps=3, seeds=1, body=body))
    assert result.complete


def test_a_disk_that_refuses_ends_the_runner_with_a_message(tmp_path, inline, monkeypatch) -> None:
    file = write_study(tmp_path, steps=3, seeds=1, body="")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kfacore.lab.studies.plan.write_json", full)
    with pytest.raises(ResourceError, match="No space left on device; free some space"):
        go(tmp_path, file)


def test_a_process_reads_the_plan_that_its_own_machine_has_written(tmp_path, inline) -> None:
    """Machines that share a study may keep their data in different places."""
    result, _ = go(tmp_path, write_study(tmp_path, steps=1, seeds=1, body=""))
    folder = state_folder(tmp_path / "out", result.study.runs[0].hash)
    own = _read_planned(tmp_path / "out", folder.name)
    (folder / "planned.json").write_text(json.dumps({**own, "config": {"problem": {"data_dir": "/elsewhere"}}}))
    assert _read_planned(tmp_path / "out", folder.name) == own
    own_plan(folder).unlink()  # a batch system's job on a machine that has planned nothing
    assert _read_planned(tmp_path / "out", folder.name)["config"] == {"problem": {"data_dir": "/elsewhere"}}
