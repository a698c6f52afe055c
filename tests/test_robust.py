"""`benchmarks/robust`: K-FAC with nothing set trains its small problems, and the race itself counts what it should."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.robust import command, contenders, race
from benchmarks.robust.contenders import Stepped, choose_contenders
from benchmarks.robust.problems import PROBLEMS, QUICK, choose
from benchmarks.robust.race import Budget, Record
from benchmarks.robust.store import Store
from benchmarks.robust.table import rows, standing, strangers, summary
from benchmarks.robust.verdict import Evaluation, judge
from kfac_plugins.optimizers.muon import orthogonalised
from kfacore.registry import get_registry

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the small data sets come with scikit-learn")

STEPS = 80
BUDGET = Budget(steps=STEPS)


@pytest.mark.parametrize("problem", QUICK)
def test_kfac_with_nothing_set_is_accepted(problem: str) -> None:
    """Steps are counted, not seconds: the same on every machine."""
    record = race.race(problem, 0, f"kfac:{'tridiag' if QUICK.index(problem) % 2 else 'blockdiag'}", BUDGET)
    said = {name: record[name] for name in ("error", "nan", "doubled", "rose", "first", "best", "final")}
    assert record["steps"] == STEPS, said
    assert record["error"] is None, said
    assert not record["nan"], said
    assert not record["doubled"], said
    assert not record["rose"], said
    assert record["final"] < record["first"], said


def test_problems_are_many_and_sound() -> None:
    assert len(PROBLEMS) >= 40
    for problem in PROBLEMS.values():
        if problem.missing() or problem.name == "curves":  # its images take half a second
            continue
        task = problem.build(0)
        likelihood = get_registry().build("likelihood", task.likelihood)
        with torch.no_grad():
            outputs = task.model(task.x[:5])
        for y in (task.y, task.y_test):
            likelihood.check_targets(y, outputs.shape[1], problem.name)
        assert task.x.isfinite().all()
        assert bool(likelihood.nll(outputs, task.y[:5]).isfinite().all())
        assert len(task.x) == len(task.y)
        assert len(task.x_test) == len(task.y_test) > 0


def test_a_seed_is_a_problem_of_its_own() -> None:
    first, again, other = (PROBLEMS["moons"].build(seed) for seed in (0, 0, 1))
    for name in ("x", "y", "x_test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.x, other.x)
    weights = [task.model.state_dict()["0.weight"] for task in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_problems_and_contenders_are_chosen_by_name_and_kind() -> None:
    assert {problem.kind for problem in choose(["batch"])} == {"batch"}
    assert [problem.name for problem in choose(["wave", "moons"])] == ["moons", "wave"]
    assert choose_contenders(["adam:0.001", "kfac"]) == ["kfac:blockdiag", "kfac:tridiag", "adam:0.001"]
    assert choose_contenders(None, only_kfac=True) == ["kfac:blockdiag", "kfac:tridiag"]
    with pytest.raises(ValueError, match="no problem or kind is called 'moon'"):
        choose(["moon"])
    with pytest.raises(ValueError, match="no contender is called sgd"):
        choose_contenders(["sgd"])


def _whole(*losses: float, steps: int = 20) -> list[Evaluation]:
    return [Evaluation(float(i), i * steps, loss, loss) for i, loss in enumerate(losses)]


FALLING = [1.0 / (1 + i) for i in range(100)]


def test_a_good_run_is_not_condemned() -> None:
    verdict = judge(FALLING, _whole(1.0, 0.1, 0.01), finite_model=True)
    assert not any(getattr(verdict, name) for name in ("nan", "doubled", "rose", "batches_rose", "whole_rose"))
    assert verdict.last_ten == verdict.best_ten == pytest.approx(sum(FALLING[-10:]) / 10)


def test_nan_is_seen_wherever_it_is() -> None:
    assert judge([*FALLING, math.nan], _whole(1.0, 0.1), finite_model=True).nan
    assert judge(FALLING, _whole(1.0, math.inf, 0.1), finite_model=True).nan
    assert judge(FALLING, _whole(1.0, 0.1), finite_model=False).nan


def test_a_doubled_evaluation_counts_after_ten_steps_and_above_the_floor() -> None:
    assert judge(FALLING, _whole(1.0, 0.1, 0.2, 0.05), finite_model=True).doubled
    assert not judge(FALLING, _whole(1.0, 0.1, 0.199, 0.05), finite_model=True).doubled
    assert not judge(FALLING, _whole(1.0, 2.0, 0.1, steps=10), finite_model=True).doubled
    assert not judge(FALLING, _whole(1.0, 1e-4, 9e-4), finite_model=True).doubled


def test_a_rise_counts_beyond_the_noise_of_mini_batches() -> None:
    risen = [*FALLING, *[0.1] * 10]
    assert judge(risen, _whole(1.0, 0.1, 0.12), finite_model=True).rose
    noisy = [*FALLING, *[0.01, 0.2] * 5]  # a mean of 0.105 with an error of 0.03
    assert judge(noisy, _whole(1.0, 0.1, 0.12), finite_model=True).batches_rose
    within = [0.1, 0.3] * 20 + [0.1, 0.1, 0.3] * 10 + [0.1, 0.3] * 5
    assert not judge(within, _whole(1.0, 0.1, 0.12), finite_model=True).rose
    assert not judge(risen, _whole(1.0, 0.1, 0.1), finite_model=True).rose  # the best ten were lucky
    assert judge(FALLING, _whole(1.0, 0.1, 0.15, 0.21), finite_model=True).rose  # whatever the mini-batches say


def _stepper(losses: list[float]) -> Any:
    given = iter(losses)

    def step(x: torch.Tensor, y: torch.Tensor) -> Stepped:
        loss = next(given)
        if loss < 0:
            raise RuntimeError("it broke")
        return Stepped(loss, accepted=loss < 5)

    return step


def _race(monkeypatch: pytest.MonkeyPatch, losses: list[float], steps: int) -> Record:
    monkeypatch.setattr(race, "start", lambda *_: _stepper(losses))
    return race.race("moons", 0, "adam:0.001", Budget(steps=steps))


def test_a_run_keeps_to_its_steps_and_counts_what_was_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _race(monkeypatch, [1.0, 9.0, 1.0, *[0.5] * 37], 40)
    assert (record["steps"], record["rejected"], record["error"], record["diverged"]) == (40, 1, None, False)
    steps = [step for _, step, _, _ in record["evaluations"]]
    assert steps[0] == 0
    assert steps[-1] == 40
    assert steps == sorted(set(steps))
    assert len(steps) >= 12


def test_a_run_that_fails_is_a_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _race(monkeypatch, [1.0, 1.0, -1.0], 40)
    assert record["error"] == "RuntimeError: it broke"
    assert record["diverged"]
    assert record["steps"] == 2
    lost = _race(monkeypatch, [1.0, *[math.nan] * 39], 40)
    assert lost["nan"]
    assert lost["steps"] == 11


def _record(contender: str, final: float, seed: int = 0, **more: Any) -> Record:
    flags = dict.fromkeys(("diverged", "nan", "doubled", "rose", "batches_rose", "whole_rose"), False)
    losses = {"first": 1.0, "best": final, "final": final, "first_test": 1.0, "best_test": final, "final_test": final}
    start = {"problem": "moons", "kind": "classifier", "seed": seed, "contender": contender, "budget": vars(BUDGET)}
    return {**start, "steps": 7, "rejected": 2, "error": None, **flags, **losses, **more}


def test_ratios_are_of_medians_to_the_best_rate_with_a_floor() -> None:
    mine = [_record("kfac:blockdiag", loss, seed) for seed, loss in enumerate((0.002, 0.02, 0.003))]
    theirs = [_record("adam:0.001", 0.5, seed) for seed in range(3)]
    theirs += [_record("adam:0.01", loss, seed) for seed, loss in enumerate((0.001, 0.9, 0.001))]
    (row,) = rows([*mine, *theirs], "kfac:blockdiag")
    assert row["/ adam"] == pytest.approx((0.003 + 0.001) / (0.001 + 0.001))
    assert row["/ muon"] is None
    assert (row["diverged"], row["undone"]) == ("0/3", 6)
    lines = {line[""]: line for line in standing([*mine, *theirs], "kfac:blockdiag")}
    assert list(lines) == ["kfac:blockdiag / adam", "kfac:blockdiag test / adam"]
    assert (lines["kfac:blockdiag / adam"]["<= 1.5"], lines["kfac:blockdiag / adam"]["problems"]) == (0, 1)
    line = summary([*mine, *theirs], "kfac:blockdiag")
    assert (line["runs"], line["diverged"], line["undone"]) == (3, 0, 6)
    failed = _record("kfac:blockdiag", math.nan, error="NumericalError: no", diverged=True)
    (row,) = rows([failed, *theirs], "kfac:blockdiag")
    assert row["/ adam"] == math.inf


def test_records_of_other_problems_are_noticed() -> None:
    assert strangers([_record("kfac:blockdiag", 0.1), _record("adam:0.01", 0.1)]) == []
    assert strangers([_record("kfac:blockdiag", 0.1), _record("adam:0.01", 0.1, first=1.1)]) == ["moons"]


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    store = Store(file, BUDGET)
    store.add(_record("kfac:tridiag", math.nan))
    store.add(_record("adam:0.01", 0.1))
    assert json.loads(file.read_text())["runs"][0]["final"] is None
    again = Store(file, BUDGET)
    assert [record["contender"] for record in again] == ["kfac:tridiag", "adam:0.01"]
    assert math.isnan(next(iter(again))["final"])
    assert list(Store(file, Budget(steps=STEPS + 1))) == []
    other = Store(None, BUDGET)
    assert other.take(file, kfac=False) == 1
    assert ("moons", 0, "adam:0.01") in other
    changed = json.loads(file.read_text())
    changed["runs"][0]["code"] = "another"
    file.write_text(json.dumps(changed))
    assert [record["contender"] for record in Store(file, BUDGET)] == ["adam:0.01"]


def test_the_command_races_prints_and_takes_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--problems", "wine", "--seeds", "1", "--steps", "3"]
    baseline, out = tmp_path / "baseline.json", tmp_path / "out.json"
    assert command.main([*shared, "--contenders", "adam:0.01", "muon:0.01", "--out", str(baseline)]) == 0
    capsys.readouterr()
    kfac = ["--contenders", "kfac:blockdiag", "--baseline", str(baseline), "--out", str(out)]
    assert command.main([*shared, *kfac]) in (0, 1)
    printed = capsys.readouterr().out
    assert "2 runs taken from" in printed
    assert "1/1 wine seed 0 kfac:blockdiag" in printed
    saved = json.loads(out.read_text())
    assert len(saved["runs"]) == 3
    assert saved["settings"]["budget"] == {"seconds": None, "steps": 3}
    assert saved["tables"][0]["rows"][0]["/ muon"] > 0
    assert command.main(["--problems", "nothing"]) == 2


def test_soap_is_left_out_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "find_spec", lambda _: None)
    assert contenders.missing("soap:0.01") is not None
    assert contenders.missing("adam:0.01") is None


def test_muon_takes_the_step_of_torch() -> None:
    """Up to the rounding of torch's bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in ((20, 6), (3, 12), (1, 5)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        reference = _zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
        assert float((orthogonalised(matrix) - reference).norm() / reference.norm()) < 0.03
