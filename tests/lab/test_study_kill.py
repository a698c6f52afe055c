"""A study killed with SIGKILL at random moments, runner and workers, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, until
from small_runs import events_of
from small_studies import Nest, write_study

from kfacore.lab.studies.claims import read_holder
from kfacore.lab.studies.plan import Study, load_study
from kfacore.lab.studies.state import read_journal, read_state
from kfacore.lab.training.checkpoint import load_checkpoint

LINES = 23
"""Of a run: 12 steps, 4 evaluations, 5 checkpoints, a start and an end."""


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    nest = Nest()
    yield nest
    nest.close()


def lines_written(study: Path) -> int:
    """Events that the runs have ever shown, as far as they are still on file."""
    return sum(map(lines_of, (study / "runs").glob("*")))


def lines_of(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:  # not yet, or no more: what was killed before its first checkpoint begins anew
        return 0


def workers_of(study: Path) -> list[tuple[str, int]]:
    """Runs under way with the processes that execute them."""
    holders = [(folder.name, read_holder(folder)) for folder in study.glob("state/*/") if folder.is_dir()]
    return [(name, holder.pid) for name, holder in holders if holder is not None and not holder.gone]


def parent_of(pid: int) -> int:
    """The process that has started another one; 0 if that one is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def strike(how: str, study: Path, runner: int, nest: Nest) -> None:
    """Kill some of the study's processes, the runner last."""
    workers = workers_of(study)
    if how == "everything":
        # Of this runner: orphans of an earlier one, which are saving, belong to whoever takes them in.
        zygotes = {parent for _, pid in workers if parent_of(parent := parent_of(pid)) == runner}
        for pid in (runner, *zygotes, *(pid for _, pid in workers)):
            kill(pid)
    elif how == "worker" and workers:
        name, pid = workers[0]
        kill(pid)
        # The runner tells one failed run and goes on; unless the run had just ended by itself.
        until(lambda: read_state(study, name).ended)
        state = read_state(study, name)
        assert state.state == "done" or "SIGKILL" in state.reason
    kill(runner)
    assert nest.wait_for("code", PATIENCE)["code"] in (-signal.SIGKILL, 0)  # 0: it had just come to its end


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_runs(study: Study, other: Study) -> None:
    """Bit for bit: parameters, optimizer, averages, and all numbers of all events but the seconds."""
    assert [run.hash for run in study.runs] == [run.hash for run in other.runs]
    for run, twin in zip(study.runs, other.runs, strict=True):
        a, b = load_checkpoint(run.path / "checkpoint.pt"), load_checkpoint(twin.path / "checkpoint.pt")
        for name in ("model", "optimizer", "averaged", "evaluated", "step"):
            assert same(getattr(a, name), getattr(b, name)), (run.variant, run.seed, name)
        assert events_of(run.path, "step", "eval") == events_of(twin.path, "step", "eval")


@pytest.mark.parametrize(("seeds", "kills"), [(1, 4), pytest.param(3, 10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, nest, seeds, kills) -> None:
    file, count = write_study(tmp_path, seeds=seeds), 4 * seeds
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    nest.start(file, calm)
    assert nest.wait_for("code", PATIENCE)["code"] == 0
    draw = random.Random(20150706)
    for how in islice(cycle(["worker", "everything", "runner"]), kills):
        goal = lines_written(wild) + draw.randint(1, 20)
        if goal > count * LINES:  # this process had to wait so long for its turn that the study is nearly over
            break
        runner = nest.start(file, wild, retry_failed=True)
        until(lambda goal=goal: lines_written(wild) >= goal)
        strike(how, wild, runner, nest)
    nest.start(file, wild, retry_failed=True)
    assert nest.wait_for("code", PATIENCE)["code"] == 0
    study = load_study(wild)
    assert study.counts()["done"] == len(study.runs) == count
    assert_same_runs(study, load_study(calm))
    assert sorted(path.name for path in (wild / "runs").iterdir()) == sorted(run.hash for run in study.runs)
    lives = 0
    for run in study.runs:
        what = [line["what"] for line in read_journal(wild, run.hash)]
        assert what.count("done") == 1
        assert what[-1] == "done", "nothing is started again after its end"
        assert [event["event"] for event in events_of(run.path)].count("done") == 1
        lives += what.count("started") + what.count("resumed")
    assert lives > count, "some runs must have had more than one life"


def test_two_runners_on_one_folder_share_the_work(tmp_path, nest) -> None:
    file = write_study(tmp_path, seeds=1)
    out = tmp_path / "out"
    runners = {nest.start(file, out), nest.start(file, out)}
    answers = [nest.wait_for("code", PATIENCE) for _ in runners]
    assert [answer["code"] for answer in answers] == [0, 0]
    study = load_study(out)
    assert study.counts()["done"] == 4
    processes = set()
    for run in study.runs:
        journal = read_journal(out, run.hash)
        assert [line["what"] for line in journal] == ["started", "done"]
        processes.add(journal[0]["pid"])
    assert len(processes) == 4, "a process of its own for every run"
    # Two runners with two workers each keep the machine busy with several runs: their seconds are marked.
    assert any((out / "state" / run.hash / "shared").exists() for run in study.runs)
