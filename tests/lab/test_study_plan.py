from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_studies import write_study

from kfacore.errors import ConfigError, DataError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.studies.config import StudyConfig, read_study, study_schema
from kfacore.lab.studies.folder import plan_into
from kfacore.lab.studies.identity import relevant, run_hash
from kfacore.lab.studies.plan import load_study
from kfacore.lab.studies.planner import UNLIMITED_STEPS, plan_study
from kfacore.registry import get_registry


def plan_of(tmp_path: Path, text: str, **options: Any) -> Any:
    file = tmp_path / "s.toml"
    file.write_text(text, encoding="utf-8")
    config = read_study(file, **options)
    return plan_study(get_registry(), config, tmp_path / "out", origin=file.name)


def names_of(plan: Any) -> list[str]:
    return [variant.name for variant in plan.study.variants]


ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "studies").glob("*.toml"))


@pytest.fixture
def ekfac(install_plugin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example plug-in that the studies of networks need."""
    monkeypatch.syspath_prepend(str(ROOT / "plugins" / "examples" / "kfac-ekfac"))
    install_plugin("third_party", "from kfac_ekfac import KFAC_API, kfac_components\n")
    yield
    sys.modules.pop("kfac_ekfac", None)


@pytest.mark.usefixtures("ekfac")
@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_ready_studies_can_be_planned(tmp_path, file: Path) -> None:
    """Every key and name in them exists, and each is called what its file is called."""
    plan = plan_study(get_registry(), read_study(file), tmp_path / "out", origin=file.name)
    assert plan.study.name == file.stem
    assert plan.study.reference in names_of(plan)
    runs = [*plan.study.runs, *(run for tuning in plan.tunings for run in tuning.runs)]
    assert len({run.hash for run in runs}) == len(runs) > 0


class TestVariants:
    def test_a_grid_has_all_combinations_the_last_axis_fastest(self, tmp_path) -> None:
        plan = plan_of(tmp_path, '[axes]\napprox = ["tridiag", "blockdiag"]\ndamping.lambda0 = [0.1, 1]\n')
        assert names_of(plan) == [
            "approx=tridiag, damping.lambda0=0.1",
            "approx=tridiag, damping.lambda0=1",
            "approx=blockdiag, damping.lambda0=0.1",
            "approx=blockdiag, damping.lambda0=1",
        ]
        assert [(r.config["approx"]["kind"], r.config["damping"]["lambda0"]) for r in plan.study.runs] == [
            ("tridiag", 0.1), ("tridiag", 1.0), ("blockdiag", 0.1), ("blockdiag", 1.0),
        ]  # fmt: skip
        assert plan.study.reference == "approx=tridiag, damping.lambda0=0.1"

    def test_one_at_a_time_changes_one_key_of_the_base(self, tmp_path) -> None:
        plan = plan_of(
            tmp_path,
            '[base]\ndamping.lambda0 = 0.5\n[one_at_a_time]\napprox = ["tridiag"]\n"damping.lambda0" = [0.1, 2.0]\n',
        )
        assert names_of(plan) == ["base", "approx=tridiag", "damping.lambda0=0.1", "damping.lambda0=2.0"]
        found = [(run.config["approx"]["kind"], run.config["damping"]["lambda0"]) for run in plan.study.runs]
        assert found == [("blockdiag", 0.5), ("tridiag", 0.5), ("blockdiag", 0.1), ("blockdiag", 2.0)]

    def test_named_variants_and_what_the_base_has_for_another_optimizer(self, tmp_path) -> None:
        text = """
        reference = "plain"
        [base]
        approx = { kind = "tridiag", refresh_every = 7 }
        damping.lambda0 = 3.0
        [[variants]]
        name = "sgd"
        optimizer = { kind = "sgd", lr = 0.1 }
        [[variants]]
        name = "plain"
        """
        plan = plan_of(tmp_path, text)
        assert names_of(plan) == ["sgd", "plain"]
        sgd, plain = plan.study.runs
        assert sgd.config["approx"] is None
        assert plain.config["approx"]["refresh_every"] == 7
        assert plan.study.reference == "plain"
        assert plan.study.variants[0].overrides == {"optimizer": {"kind": "sgd", "lr": 0.1}}

    def test_without_any_the_base_is_the_study(self, tmp_path) -> None:
        plan = plan_of(tmp_path, "seeds = [3, 1]\n")
        assert names_of(plan) == ["base"]
        assert [run.seed for run in plan.study.runs] == [3, 1]

    def test_tables_and_switches_as_values(self, tmp_path) -> None:
        text = '[one_at_a_time]\ndamping = [{ kind = "fixed", gamma = 0.1 }]\ndamping.pi = ["none"]\n'
        text = text.replace("damping = [", '"damping" = [').replace("damping.pi", '"damping.pi"')
        assert names_of(plan_of(tmp_path, text)) == ["base", "damping=fixed(gamma=0.1)", "damping.pi=none"]


class TestPairing:
    def test_problems_and_seeds_cross_every_variant(self, tmp_path) -> None:
        text = """
        seeds = 2
        problems = ["curves", { kind = "faces", patches_per_image = 40 }]
        [axes]
        approx = ["tridiag", "blockdiag"]
        """
        plan = plan_of(tmp_path, text)
        assert plan.study.problems == ("curves", "faces")
        found = [(run.variant, run.problem, run.seed) for run in plan.study.runs]
        assert len(found) == len(set(found)) == 8
        assert plan.total == 8
        faces = plan.study.of("approx=blockdiag", "faces")
        assert [run.config["problem"]["patches_per_image"] for run in faces] == [40, 40]
        assert [run.config["likelihood"]["kind"] for run in faces] == ["gaussian", "gaussian"]
        for seed in (0, 1):
            assert {run.config["seed"] for run in plan.study.runs if run.seed == seed} == {seed}

    def test_two_problems_of_a_kind_have_two_names(self, tmp_path) -> None:
        text = 'problems = ["faces", { kind = "faces", patches_per_image = 4 }]\n'
        assert plan_of(tmp_path, text).study.problems == ("faces", "faces-2")

    def test_the_budget_is_every_runs(self, tmp_path) -> None:
        run = plan_of(tmp_path, "budget = { seconds = 5.0, cases = 1000 }\n").study.runs[0]
        assert run.config["budget"] == {"seconds": 5.0, "cases": 1000}
        assert run.config["steps"] == UNLIMITED_STEPS
        run = plan_of(tmp_path, "budget.steps = 7\nthreads = 2\n").study.runs[0]
        assert (run.config["steps"], run.config["threads"]) == (7, 2)


class TestHash:
    def test_where_and_how_often_do_not_count(self) -> None:
        registry = get_registry()
        base = resolve(registry)
        for change in (
            'problem.data_dir="x"', "checkpoint.every=3", "pictures=false", 'sink=["jsonl", "tensorboard"]',
        ):  # fmt: skip
            assert run_hash(registry, resolve(registry, sets=[change])) == run_hash(registry, base), change
        # A preset is a name for values; the values count, the name does not.
        same = ["preset=default", "approx=tridiag", "damping.lambda0=0.1", "damping.gamma_rule=tied",
                "damping.rate=0.95",
                "damping.pi=net", "damping.units=inputs",
                "momentum.tau2=0.125", "momentum.min_cases=250", "approx.tolerance=0.02",
                "approx.refresh_growth=0.4", "approx.power=0.85", "batch.start=500", "batch.sampling=epochs",
                "averaging.start=20", "averaging.decay=0.9", "estimator.min_cases=250", "damping.confirmed=true",
                "momentum.slope=model", "momentum.mu_min=0", "momentum.mu_max=1", "trust=undo",
                "approx.refresh_share=0.33"]  # fmt: skip
        values = resolve(registry, sets=["preset=heskes", "estimator=monte-carlo", "damping=levenberg-marquardt",
                                         "momentum=quadratic-model", *same[1:]])  # fmt: skip
        assert run_hash(registry, values) == run_hash(registry, resolve(registry, sets=same))

    @pytest.mark.parametrize(
        "change",
        ["seed=1", "threads=2", "steps=501", "device=cpu", "dtype=float64", "eval.every=7", "damping.lambda0=0.2",
         "budget.cases=5", "problem=faces", "averaging.decay=0.5", "weight_decay=0.0"],
    )  # fmt: skip
    def test_everything_else_counts(self, change) -> None:
        registry = get_registry()
        assert run_hash(registry, resolve(registry, sets=[change])) != run_hash(registry, resolve(registry))

    def test_versions_count(self, monkeypatch) -> None:
        registry = get_registry()
        config = resolve(registry)
        before = run_hash(registry, config)
        monkeypatch.setattr("kfacore.__version__", "99.0")
        assert run_hash(registry, config) != before

    def test_relevant_leaves_its_argument_alone(self) -> None:
        config = resolve(get_registry()).as_dict()
        copy = json.loads(json.dumps(config))
        relevant(config)
        assert config == copy


ERRORS = [
    ("sedes = 3\n", "unknown key 'sedes', did you mean 'seeds'"),
    ("approx = 'tridiag'\n", "unknown key 'approx' of a study; it is a key of the runs, write base.approx"),
    ("seed = 3\n", r"unknown key 'seed' of a study; write seeds = \[...\]"),
    ("seeds = []\n", "a study needs at least one seed"),
    ("seeds = [1, 1]\n", "the same seed twice"),
    ("seeds = 0\n", "seeds.* greater than or equal to 1"),
    ("seeds = [0, -1]\n", r"seeds.1 = -1: input should be greater than or equal to 0"),
    ("executor = 3\n", "executor = 3: input should be a valid string or input should be a valid dictionary"),
    ("problems = ['curves', 'curves']\n", r"problems\[1\]: 'curves' is there twice"),
    ("[base]\naprox = 'tridiag'\n", r"s.toml \[base\]: unknown key 'aprox', did you mean 'approx'"),
    ("[base]\nsteps = 3\n", r"\[base\]: 'steps' belongs to the study as a whole, write \[budget\] steps"),
    ("[base]\ndamping.lamda0 = 3.0\n", r"\[base\].*unknown key 'lamda0' in damping, did you mean 'lambda0'"),
    ("[base]\noptimizer = 'sgd'\napprox = 'tridiag'\n", "the optimizer 'sgd' does not use approx"),
    ("[base]\nsink = 'tensorboard'\n", "no jsonl sink"),
    ("[axes]\ndampin.lambda0 = [1]\n", "unknown key 'dampin', did you mean 'damping'"),
    ("[axes]\ndamping.lamda0 = [1]\n", r"\[axes\] damping.lamda0 = 1.*unknown key 'lamda0' in damping, did you mean"),
    ("[axes]\napprox = ['tridag']\n", r"axes\] approx = \"tridag\": unknown approx 'tridag', did you mean 'tridiag'"),
    ("[axes]\napprox = 'tridiag'\n", "an axis needs a list of values"),
    ("[axes]\napprox = []\n", "the study has no runs: an axis has no values"),
    ("[axes]\nseed = [1, 2]\n", "'seed' belongs to the study as a whole"),
    ("[axes]\nproblem = ['curves', 'faces']\n", "a variant cannot change the problem; write problems"),
    ("[axes]\na = [1]\n[one_at_a_time]\nb = [2]\n", "exclude each other"),
    ("[one_at_a_time]\napprox = ['blockdiag']\n", "the variants 'base' and 'approx=blockdiag' are the same"),
    ("[[variants]]\nname = 'a'\n[[variants]]\nname = 'a'\napprox = 'blockdiag'\n", "two variants are called 'a'"),
    ("[[variants]]\napprox = 'blockdiag'\n", "'variants.0.name' is missing"),
    ("[[variants]]\nname = 'a'\nbatch.strt = 3\n", "variant 'a'.*unknown key 'strt' in batch, did you mean 'start'"),
    ("[[variants]]\nname = 'a'\noptimizer = 'sgd'\ndamping.pi = 'none'\n", "variant 'a'.*'sgd' does not use damping"),
    ("reference = 'bse'\n", "reference = 'bse' is no variant, did you mean 'base'"),
    ("target = { measure = 'eror', value = 1.0 }\n", "target.measure = 'eror' is not known"),
    ("target.measure = 'train_error'\n", "'target.value' is missing"),
    ("budget.minutes = 3\n", "unknown key 'minutes' in budget"),
    ("[[variants]]\nname = 'a'\ntune.axes.optimizer.lr = []\n", "there is nothing to try"),
    ("this is no toml\n", "is not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, text)


class TestSets:
    def test_keys_of_the_study_in_tables_and_lists(self, tmp_path) -> None:
        text = "budget.steps = 5\n[[variants]]\nname = 'a'\n[[variants]]\nname = 'b'\napprox = 'tridiag'\n"
        sets = ["budget.steps=3", "base.weight_decay=0.5", "variants.1.name=c", "executor.workers=4", "seeds=[5]"]
        plan = plan_of(tmp_path, text, sets=sets)
        assert names_of(plan) == ["a", "c"]
        assert {(run.config["steps"], run.config["weight_decay"], run.seed) for run in plan.study.runs} == {(3, 0.5, 5)}
        config = read_study(tmp_path / "s.toml", sets=sets)
        assert config.executor == {"kind": "local", "workers": 4}
        assert read_study(tmp_path / "s.toml", sets=sets, executor="slurm").executor == {"kind": "slurm", "workers": 4}
        chosen = read_study(tmp_path / "s.toml", sets=["executor.partition=gpu"], executor="slurm")
        assert chosen.executor == {"kind": "slurm", "partition": "gpu"}

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("budgt.steps=3", "--set budgt.steps=3: unknown key 'budgt', did you mean 'budget'"),
            ("approx=tridiag", "--set approx=tridiag: a key of the runs is set in the base, write base.approx"),
            ("seeds", "needs the form KEY=VALUE"),
            ("seeds=0", "--set seeds=0: seeds"),
            ('variants.0.name=""', '--set variants.0.name="": variants.0.name'),
            ("variants.name=c", "variants is a list of 1, write variants.0"),
            ("variants.3.name=c", "variants is a list of 1"),
            ("name.first=c", "name = 's' is no table"),
        ],
    )
    def test_slips(self, tmp_path, assignment, message) -> None:
        with pytest.raises(ConfigError, match=message):
            plan_of(tmp_path, "name = 's'\n[[variants]]\nname = 'a'\n", sets=[assignment])


class TestFolder:
    def test_the_study_comes_back_from_its_folder(self, tmp_path) -> None:
        config = read_study(write_study(tmp_path, top="target = { value = 0.5 }"))
        plan = plan_into(get_registry(), config, tmp_path / "out")
        plan.study.write()
        plan.study.write_index()
        found = load_study(tmp_path / "out")
        assert found.as_dict() == json.loads(json.dumps(plan.study.as_dict()))
        assert found.runs == plan.study.runs
        assert found.target == plan.study.target
        assert found.counts() == {"pending": 12, "running": 0, "done": 0, "failed": 0, "diverged": 0}
        assert {"kfacore", "torch", "numpy"} <= set(found.versions)

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda out: out.write_text("x"), "is a file"),
            (lambda out: (out.mkdir(), (out / "config.json").write_text("{}")), "holds a run of kfac train"),
            (lambda out: (out.mkdir(), (out / "notes.txt").write_text("x")), "holds other files and no study"),
        ],
    )
    def test_folders_of_something_else_are_refused(self, tmp_path, prepare, message) -> None:
        out = tmp_path / "out"
        prepare(out)
        with pytest.raises(ConfigError, match=message):
            plan_into(get_registry(), read_study(write_study(tmp_path)), out)

    def test_the_folder_of_another_study_is_refused(self, tmp_path) -> None:
        file = write_study(tmp_path)
        plan = plan_into(get_registry(), read_study(file, sets=["name=first"]), tmp_path / "out")
        plan.study.write()
        with pytest.raises(ConfigError, match="holds the study 'first', not 'second'; choose another folder"):
            plan_into(get_registry(), read_study(file, sets=["name=second"]), tmp_path / "out")

    def test_reading_what_is_no_study_or_damaged(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="is not a study folder"):
            load_study(tmp_path)
        (tmp_path / "study.json").write_text("{")
        with pytest.raises(DataError, match=r"study.json cannot be read"):
            load_study(tmp_path)
        (tmp_path / "study.json").write_text('{"format": 99}')
        with pytest.raises(DataError, match="has format 99, this version reads 1"):
            load_study(tmp_path)
        (tmp_path / "study.json").write_text('{"format": 1}')
        with pytest.raises(DataError, match="cannot be read: KeyError"):
            load_study(tmp_path)


def test_the_schema_knows_the_keys() -> None:
    schema = study_schema(get_registry())
    assert set(schema["properties"]) == set(StudyConfig.model_fields)
    assert "approx" in schema["properties"]["base"]["properties"]
    assert "seed" not in schema["properties"]["base"]["properties"]
    variant = schema["$defs"]["VariantConfig"]
    assert {"name", "tune", "momentum"} <= set(variant["properties"])
    assert variant["additionalProperties"] is False
    text = json.dumps(schema)
    for reference in {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}:
        assert reference in schema["$defs"]


@pytest.mark.usefixtures("ekfac")
@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_ready_studies_resolve(file, tmp_path) -> None:
    config = read_study(file)
    assert config.name == file.stem
    plan = plan_study(get_registry(), config, tmp_path, origin=file.name)
    assert len(plan.study.seeds) >= 3
    assert plan.study.target is not None
    assert plan.total > 15


@pytest.mark.usefixtures("ekfac")
@pytest.mark.parametrize("name", ["networks-gpt", "networks-cnn"])
def test_networks_are_tuned_alike(name: str) -> None:
    """Six optimizers with three candidates each, chosen by one measure in runs of one length."""
    plan = plan_study(get_registry(), read_study(ROOT / "studies" / f"{name}.toml"), Path("out"))
    assert [tuning.variant for tuning in plan.tunings] == names_of(plan)
    assert names_of(plan) == ["blockdiag", "tridiag", "ekfac", "guest around adamw", "adamw", "muon"]
    assert {(len(tuning.runs), tuning.measure) for tuning in plan.tunings} == {(3, "test_loss")}
    budgets = [run.config["budget"] for tuning in plan.tunings for run in tuning.runs]
    assert all(budget["seconds"] == 20.0 for budget in budgets), budgets


def test_a_study_without_its_plug_in_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="'ekfac'"):
        plan_study(get_registry(), read_study(ROOT / "studies" / "networks-gpt.toml"), Path("out"))


def test_the_ablation_switches_off_each_element() -> None:
    plan = plan_study(get_registry(), read_study(READY[0]), Path("out"))
    assert READY[0].stem == "ablation"
    base = relevant(plan.study.of("base")[0].config)
    for variant in plan.study.variants[1:]:
        changed = relevant(plan.study.of(variant.name)[0].config)
        keys = {key for key in base if base[key] != changed[key]}
        assert len(keys) == (4 if variant.name == "heskes" else 1), (variant.name, keys)
