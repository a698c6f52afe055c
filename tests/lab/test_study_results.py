"""The results of a study: what is found in its runs, and what is concluded."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from study_folders import STEPS, error_at, write_study
from study_reports import cell, page_of, whole_study

from kfacore.lab.studies.plan import Study, Target, load_study
from kfacore.lab.studies.report import write_report
from kfacore.lab.studies.report_data import read_runs
from kfacore.lab.studies.report_limits import limits
from kfacore.lab.studies.report_results import analyse
from kfacore.lab.studies.statistics import summarise
from kfacore.lab.studies.tables import latex_tables, signed


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return whole_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def results(study):
    loaded = load_study(study.folder)
    return analyse(loaded, read_runs(loaded))


def test_values_are_those_of_the_last_evaluation(results):
    reference = cell(results, "tridiag")
    luck = [1.0 + 0.1 * float(np.random.default_rng([seed, 7]).standard_normal()) for seed in range(6)]
    wanted = summarise([0.9 * (factor * error_at(STEPS, 1.0, 0.2)) for factor in luck])
    assert reference.final["averaged_train_error"] == wanted
    assert reference.verdict == "reference"
    assert results.headline == "averaged_train_error"
    assert set(results.measures) >= {"train_error", "test_error", "train_loss", "averaged_test_error"}
    assert "test_loss" not in results.measures  # nobody has one


def test_a_run_without_averaging_reports_its_current_parameters(results):
    run = next(run for run in cell(results, "nesterov").runs if run.done)
    assert run.final("averaged_train_error") == run.final("train_error") is not None


def test_differences_pair_the_seeds(results):
    found = cell(results, "blockdiag").differences["averaged_train_error"]
    luck = np.array([1.0 + 0.1 * float(np.random.default_rng([seed, 7]).standard_normal()) for seed in range(6)])
    wanted = 0.9 * luck * (error_at(STEPS, 1.2, 0.15) - error_at(STEPS, 1.0, 0.2))
    assert (found.n, found.lost) == (6, 0)
    assert found.mean == pytest.approx(wanted.mean())
    assert found.std == pytest.approx(wanted.std(ddof=1))
    assert found.p == 2 / 64


def test_lost_runs_are_counted_and_never_averaged(results):
    wild, nesterov = cell(results, "wild & <b>"), cell(results, "nesterov")
    assert (wild.verdict, wild.count("diverged"), wild.final["train_error"].n) == ("broken", 1, 5)
    assert (nesterov.verdict, nesterov.count("failed"), nesterov.final["train_error"].n) == ("broken", 1, 5)
    assert wild.differences["train_error"].lost == 1
    diverged = next(run for run in wild.runs if run.state == "diverged")
    assert (diverged.final("train_error"), diverged.best("train_error")) == (None, None)


def test_times_to_target_keep_those_that_never_reach_it(results):
    first = cell(results, "tridiag").targets
    assert (first["step"].reached, first["step"].n) == (6, 6)
    runs = cell(results, "tridiag").runs
    by_hand = []
    for run in runs:
        steps, values = run.evals["step"], run.values("averaged_train_error")
        by_hand.append(next(s for s, v in zip(steps, values, strict=True) if v <= 1.5))
    assert first["step"].median == np.median(by_hand)
    assert first["seconds"].median == pytest.approx(0.5 * np.median(by_hand))
    assert first["cases"].median == np.median([sum(100 + 10 * k for k in range(1, int(s) + 1)) for s in by_hand])
    slow = cell(results, "nesterov").targets
    assert (slow["step"].reached, slow["step"].n, slow["step"].median) == (0, 6, None)


def test_shares_say_when_one_was_as_good_as_the_other_at_its_end(results):
    slow = cell(results, "nesterov")
    assert slow.catches["seconds"].reached == 0
    caught = slow.caught["seconds"]  # the reference reaches nesterov's end
    shares = []
    for run, other in zip(cell(results, "tridiag").runs, slow.runs, strict=True):
        goal = other.final("averaged_train_error")
        if goal is not None:
            mine = run.reached("averaged_train_error", goal, "seconds")
            shares.append(mine / other.reached("averaged_train_error", goal, "seconds"))
    assert (caught.n, caught.reached) == (5, 5)
    assert caught.median == pytest.approx(np.median(shares))


def test_profile_counts_problems_and_seeds(results):
    profiles = results.profiles["step"]
    assert {profile.instances for profile in profiles.values()} == {6}
    assert profiles["nesterov"].at(math.inf) == 0.0
    assert profiles["wild & <b>"].at(100.0) <= 1.0
    assert profiles["tridiag"].at(1.0) == 1.0


@pytest.mark.parametrize(
    ("floors", "seeds", "verdicts"),
    [
        ({"same": 1.0, "worse": 2.0, "better": 0.5}, 6, ["unclear", "worse", "better"]),
        ({"same": 1.0, "worse": 2.0}, 9, ["unclear", "worse"]),
        ({"worse": 2.0}, 2, ["few"]),
        ({"worse": 2.0}, 3, ["worse"]),
    ],
)
def test_verdicts(tmp_path, floors, seeds, verdicts):
    variants = {"base": {}, **{name: {"floor": floor} for name, floor in floors.items()}}
    study = write_study(tmp_path, variants, seeds=seeds)
    results = analyse(load_study(tmp_path), read_runs(study))
    assert [cell.verdict for cell in results.cells["curves"][1:]] == verdicts


def test_verdicts_by_the_test_are_corrected_for_all_comparisons(tmp_path):
    """Six seeds can confirm one comparison (p 1/32); of two, Holm leaves 1/16, and intervals decide."""
    one = write_study(tmp_path / "one", {"base": {}, "a": {"floor": 2.0}}, seeds=6)
    found = analyse(one, read_runs(one))
    assert (found.tested, found.smallest_p, cell(found, "a").p["averaged_train_error"]) == (True, 1 / 32, 1 / 32)
    assert limits(found) == []
    two = write_study(tmp_path / "two", {"base": {}, "a": {"floor": 2.0}, "b": {"floor": 2.0}}, seeds=6)
    found = analyse(two, read_runs(two))
    assert (found.tested, found.smallest_p, cell(found, "a").p["averaged_train_error"]) == (False, 1 / 16, 1 / 16)
    assert cell(found, "a").verdict == "worse"
    (limit,) = limits(found)
    assert "it can confirm nothing here; 7 pairs would be enough" in limit


def test_without_the_test_intervals_are_widened_for_the_number_of_comparisons(tmp_path):
    """Mean 0.75, standard error 0.21: 0.75 - 3.18 * 0.21 > 0 (one comparison), 0.75 - 4.18 * 0.21 < 0 (two)."""
    noisy = {"offsets": [1.0, 1.2, 0.3, 0.5], "averaged": False}
    one = write_study(tmp_path / "one", {"base": {}, "noisy": noisy}, seeds=4, averaged=False)
    assert cell(analyse(one, read_runs(one)), "noisy").verdict == "worse"
    two = write_study(tmp_path / "two", {"base": {}, "noisy": noisy, "clear": {"floor": 9.0}}, seeds=4, averaged=False)
    found = analyse(two, read_runs(two))
    assert (cell(found, "noisy").verdict, cell(found, "clear").verdict) == ("maybe worse", "worse")
    assert "Perhaps worse (not confirmed)" in page_of(two)


def test_nobody_takes_the_place_of_a_reference_without_runs(tmp_path):
    study = write_study(
        tmp_path, {"tuned": {}, "a": {}, "b": {"floor": 2.0}}, seeds=6, target=Target("train_error", 3.0)
    )
    waiting = replace(study, runs=tuple(run for run in study.runs if run.variant != "tuned"))
    results = analyse(waiting, read_runs(waiting))
    assert [one.variant.name for one in results.cells["curves"]] == ["tuned", "a", "b"]
    assert [one.verdict for one in results.cells["curves"]] == ["reference", "waiting", "waiting"]
    assert all(one.differences["train_error"].n == 0 for one in results.cells["curves"][1:])
    assert set(results.profiles["step"]) == {"a", "b"}
    first, second = limits(results)
    assert first.startswith("The reference tuned has no runs yet")
    assert second == "The performance profiles leave out tuned, without runs yet."
    html = page_of(waiting)
    assert 'Reference <span class="name">tuned</span>: no result yet.' in html
    assert "0/0" not in latex_tables(results)["targets.tex"]


def test_a_reference_that_lost_runs_confirms_nothing(tmp_path):
    states = {("base", seed): ("diverged", "the loss is not finite") for seed in range(3)}
    study = write_study(tmp_path, {"base": {}, "a": {"floor": 2.0}}, seeds=9, states=states)
    results = analyse(study, read_runs(study))
    assert cell(results, "a").verdict == "broken"
    assert results.pairs == 6
    html = page_of(study)
    assert "reference: 3 of 9 diverged" in html
    assert " (6 pairs)" in html
    # The percentage is of the reference's mean over the same six seeds.
    base = [run.final("averaged_train_error") for run in cell(results, "base").runs]
    mean = sum(value for value in base if value is not None) / 6
    ratio = 1.0 + cell(results, "a").differences["averaged_train_error"].mean / mean
    assert ratio < 2.0
    assert f"{signed(100.0 * (ratio - 1.0), 2)} %" in html


def test_above_the_pairs_that_the_test_takes_intervals_decide(tmp_path):
    states = {("b", 30): ("running", "")}
    study = write_study(tmp_path, {"base": {}, "a": {"floor": 2.0}, "b": {"floor": 2.0}}, seeds=31, states=states)
    results = analyse(study, read_runs(study))
    assert (results.tests, results.comparisons, results.tested) == (1, 2, True)
    assert cell(results, "a").p["averaged_train_error"] is None
    assert [one.verdict for one in results.cells["curves"][1:]] == ["worse", "worse"]
    (limit,) = limits(results)
    assert limit.startswith("The sign-flip test is not computed for more than 30 pairs")
    html = page_of(study)
    assert "correction for 1 comparison." in html
    assert "or, where there is no p, the interval at 97.5 % confidence does as well" in html


def test_only_runs_that_could_still_come_there_are_censored(results):
    ends = {run.state: run.spent("seconds") for cell in results.flat() for run in cell.runs}
    assert ends == {"done": math.inf, "diverged": math.inf, "failed": pytest.approx(1.2)}  # 12 steps of 0.1 seconds


def test_fewer_than_three_seeds_have_no_intervals_and_the_page_says_so(tmp_path):
    study = write_study(tmp_path, {"base": {}, "other": {"floor": 2.0}}, seeds=2)
    html = page_of(study)
    assert "2 seeds: no intervals and no tests" in html
    answer = html[html.index('id="answer"') : html.index('id="targets"')]
    assert not re.search(r"\[[+\d]", answer)  # no interval anywhere
    assert "Differences without an interval" in answer


def test_without_a_target_the_reference_sets_it(tmp_path):
    study = write_study(tmp_path, {"base": {}, "slow": {"rate": 0.05}}, seeds=3)
    results = analyse(study, read_runs(study))
    assert results.target_from_reference
    assert results.targets["curves"] == cell(results, "base").final["averaged_train_error"].largest
    assert cell(results, "base").targets["step"].reached == 3
    assert "The study names no target" in page_of(study)


# Studies that are not in order


def test_a_study_under_way(tmp_path):
    states = {("other", seed): ("pending", "") for seed in range(3)} | {("base", 2): ("running", "")}
    html = page_of(write_study(tmp_path, {"base": {}, "other": {}}, seeds=3, states=states))
    assert '2 of 6 runs done, <strong class="waiting">4 not finished</strong>' in html
    assert "No result yet" in html
    assert "has not begun" in html


def test_a_study_without_any_result(tmp_path):
    states = {(name, 0): ("pending", "") for name in ("base", "other")}
    write_study(tmp_path, {"base": {}, "other": {}}, seeds=1, states=states)
    report = write_report(tmp_path)
    assert report.figures == ()
    assert "0 of 2 runs done" in report.html.read_text()


def test_a_damaged_run_is_shown_and_the_others_count(tmp_path):
    study = write_study(tmp_path, {"base": {}, "other": {}}, seeds=2)
    metrics = tmp_path / "runs" / study.runs[0].hash / "metrics.jsonl"
    metrics.write_text("xx\n" + metrics.read_text())
    (tmp_path / "runs" / study.runs[1].hash / "metrics.jsonl").unlink()
    results = analyse(study, read_runs(study))
    assert "line 1 is not JSON" in page_of(study)
    damaged, empty = cell(results, "base").runs
    assert (damaged.state, empty.state) == ("failed", "failed")
    assert "line 1 is not JSON" in damaged.reason
    assert "holds no evaluation" in empty.reason
    assert cell(results, "other").final["train_error"].n == 2


def test_a_torn_last_line_is_left_out(tmp_path):
    study = write_study(tmp_path, {"base": {}}, seeds=1)
    with open(tmp_path / "runs" / study.runs[0].hash / "metrics.jsonl", "a") as file:
        file.write('{"event": "ev')
    assert read_runs(study)[0].done
