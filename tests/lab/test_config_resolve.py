"""The layers of a run's configuration: precedence, changes of kind, and errors that say where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfacore.errors import ConfigError, PluginError
from kfacore.lab.config.resolve import read_saved, resolve
from kfacore.lab.config.run import BatchConfig, RunConfig
from kfacore.plugin import SLOTS
from kfacore.registry import Registry, get_registry
from kfacore.schema.presets import PRESETS

OPTIMIZERS = ["kfac", "nesterov", "sgd", "adam"]


@pytest.fixture
def registry() -> Registry:
    return get_registry()


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def test_everything_has_a_default(registry) -> None:
    config = resolve(registry)
    assert config.preset == "default"
    assert (config.problem.kind, config.optimizer.kind, config.approx.kind) == ("curves", "kfac", "blockdiag")
    assert (config.estimator.kind, [sink.kind for sink in config.sink]) == ("monte-carlo", ["jsonl"])
    assert config.likelihood.kind == "bernoulli"
    assert (config.steps, config.seed, config.device, config.dtype, config.threads) == (500, 0, "auto", "float32", None)


def test_paper_is_the_authors_program(registry) -> None:
    config = resolve(registry, preset="paper", sets=["approx=tridiag"])
    assert (config.damping.kind, config.damping.lambda0, config.damping.pi) == ("levenberg-marquardt", 150.0, "layer")
    assert (config.damping.lambda_every, config.damping.gamma_every, config.damping.rate) == (5, 20, 0.95)
    assert (config.damping.gamma_rule, config.approx.tolerance) == ("compared", 0.0)
    assert (config.estimator.kind, config.estimator.tau1, config.estimator.decay) == ("monte-carlo", 0.125, 0.95)
    assert (config.momentum.kind, config.momentum.tau2, config.approx.refresh_every) == ("quadratic-model", 1.0, 20)
    assert config.batch == BatchConfig(schedule="exponential", start=1000, target_step=500)
    assert (config.averaging.start, config.averaging.decay, config.weight_decay) == (200, 0.99, 1e-5)


def test_a_preset_leaves_out_what_the_chosen_kind_does_not_have(registry, monkeypatch) -> None:
    """Wherever the kind was chosen; what the user writes is never left out."""
    assert resolve(registry).approx.kind == "blockdiag"
    assert resolve(registry, sets=["approx=tridiag"]).approx.tolerance == PRESETS["default"]["approx"]["tolerance"]
    run_defaults = {"likelihood": {"kind": "bernoulli"}, "approx": "tridiag"}
    monkeypatch.setattr(registry.find("problem", "curves").config, "run_defaults", run_defaults)
    assert resolve(registry).approx.tolerance == PRESETS["default"]["approx"]["tolerance"]
    assert resolve(registry, sets=["approx=blockdiag"]).approx.kind == "blockdiag"
    with pytest.raises(ConfigError, match=r"--set approx.tolerance=0.1: unknown key 'tolerance' in approx"):
        resolve(registry, sets=["approx=blockdiag", "approx.tolerance=0.1"])


def test_heskes(registry) -> None:
    config = resolve(registry, preset="heskes")
    assert (config.damping.kind, config.damping.pi, config.estimator.kind) == ("fixed", None, "exact")
    assert (config.momentum.kind, config.momentum.lr, config.momentum.mu) == ("fixed", 1.0, 0.0)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_preset_serves_every_optimizer_and_survives_saving(registry, preset: str, optimizer: str) -> None:
    config = resolve(registry, preset=preset, flags={"optimizer": optimizer})
    uses = registry.find("optimizer", optimizer).uses
    for slot in ("estimator", "approx", "damping", "momentum"):
        assert (getattr(config, slot) is not None) == (slot in uses)
    saved = json.loads(json.dumps(config.as_dict()))
    assert set(saved) == set(RunConfig.model_fields)
    assert read_saved(registry, saved) == config


@pytest.mark.parametrize("problem", ["curves", "mnist", "faces", "mnist16-classifier", "npz"])
def test_every_problem_suggests_a_complete_configuration(registry, problem: str) -> None:
    assert resolve(registry, flags={"problem": problem}).problem.kind == problem


def test_precedence(registry, write) -> None:
    low = write("steps = 1\nseed = 1\nweight_decay = 0.1\n[damping]\nlambda0 = 1.0\nlambda_every = 1\n", "low.toml")
    high = write("steps = 2\nseed = 2\n[damping]\nlambda0 = 2.0\n", "high.toml")
    config = resolve(registry, files=[low, high], flags={"steps": 3, "threads": None}, sets=["steps=4"])
    assert (config.steps, config.seed, config.weight_decay) == (4, 2, 0.1)
    assert (config.damping.lambda0, config.damping.lambda_every) == (2.0, 1)
    assert resolve(registry, files=[high, low]).seed == 1
    assert resolve(registry, files=[low], flags={"steps": 3}).steps == 3


def test_preset_lies_below_files_wherever_it_is_named(registry, write, monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", {"steps": 7, "seed": 7, "averaging": {"start": 7}})
    file = write('seed = 1\npreset = "quick"\n')
    for named in (
        {"files": [file]},
        {"files": [write("seed = 1\n", "b.toml")], "preset": "quick"},
        {"files": [write('seed = 1\npreset = "paper"\n', "c.toml")], "sets": ["preset=quick"]},
        {"files": [write('seed = 1\npreset = "paper"\n', "d.toml")], "flags": {"preset": "quick"}},
    ):
        config = resolve(registry, **named)
        assert (config.preset, config.steps, config.seed, config.averaging.start) == ("quick", 7, 1, 7)
        assert config.averaging.decay == 0.99


def test_problem_suggestions_lie_between_component_defaults_and_preset(registry, monkeypatch) -> None:
    curves = registry.find("problem", "curves").config
    suggestions = {"likelihood": "gaussian", "steps": 9, "seed": 9, "damping": {"lambda0": 9.0, "lambda_every": 9}}
    monkeypatch.setattr(curves, "run_defaults", suggestions)
    monkeypatch.setitem(PRESETS, "quick", {"steps": 7, "damping": {"lambda0": 7.0}})
    config = resolve(registry, preset="quick", sets=["seed=1"])
    assert (config.likelihood.kind, config.steps, config.seed) == ("gaussian", 7, 1)
    assert (config.damping.lambda0, config.damping.lambda_every) == (7.0, 9)
    # What is suggested for a slot that the optimizer does not use is left out without a word.
    assert resolve(registry, preset="quick", flags={"optimizer": "sgd"}).damping is None
    assert suggestions["damping"] == {"lambda0": 9.0, "lambda_every": 9}


def test_missing_likelihood(registry, monkeypatch) -> None:
    monkeypatch.setattr(registry.find("problem", "curves").config, "run_defaults", {})
    with pytest.raises(ConfigError, match=r"'curves' suggests no likelihood.*known: bernoulli, categorical, gaussian"):
        resolve(registry)
    assert resolve(registry, sets=["likelihood=gaussian"]).likelihood.kind == "gaussian"
    with pytest.raises(ConfigError, match="likelihood needs a kind"):
        resolve(registry, sets=["likelihood={}"])


def test_bad_suggestion_names_the_problem(registry, monkeypatch) -> None:
    monkeypatch.setattr(registry.find("problem", "curves").config, "run_defaults", {"stepps": 3})
    with pytest.raises(ConfigError, match="suggestions of the problem 'curves': unknown key 'stepps'"):
        resolve(registry)
    monkeypatch.setattr(registry.find("problem", "curves").config, "run_defaults", {"preset": "paper"})
    with pytest.raises(ConfigError, match="'preset' cannot be suggested"):
        resolve(registry)


def test_new_kind_keeps_the_keys_it_has_and_drops_the_others(registry, write) -> None:
    file = write('[damping]\nkind = "levenberg-marquardt"\nlambda0 = 3.0\nlambda_every = 7\npi = "none"\n')
    damping = resolve(registry, files=[file], flags={"damping": "fixed"}).damping
    assert damping.model_dump() == {
        "kind": "fixed",
        "lambda0": 3.0,
        "pi": None,
        "units": "parameters",
        "gamma": None,
    }
    # A key may come before the kind that has it.
    early = write("[damping]\ngamma = 0.5\n", "early.toml")
    assert resolve(registry, files=[early], sets=["damping=fixed"]).damping.gamma == 0.5
    assert resolve(registry, sets=["damping.gamma=0.5", "damping.kind=fixed"]).damping.gamma == 0.5


def test_a_slip_does_not_vanish_with_the_kind_that_refused_it(registry, write) -> None:
    file = write("[damping]\nlamda0 = 3.0\n")
    with pytest.raises(ConfigError, match=r"run\.toml: unknown key 'lamda0' in damping.*did you mean 'lambda0'"):
        resolve(registry, files=[file], sets=["damping=fixed"])


def test_forms_of_a_slot_and_of_sinks(registry, write) -> None:
    for text in ('approx = "blockdiag"', '[approx]\nkind = "blockdiag"', 'approx = {kind = "blockdiag"}'):
        assert resolve(registry, files=[write(text)]).approx.kind == "blockdiag"
    one = resolve(registry).sink
    for text in ('sink = "jsonl"', '[sink]\nkind = "jsonl"', '[[sink]]\nkind = "jsonl"', 'sink = ["jsonl"]'):
        assert resolve(registry, files=[write(text)]).sink == one
    assert len(resolve(registry, sets=['sink=["jsonl", {kind = "jsonl"}]']).sink) == 2
    assert resolve(registry, sets=["sink.kind=jsonl"]).sink == one
    assert resolve(registry, sets=["sink=[]"]).sink == ()


def test_values_of_set(registry) -> None:
    config = resolve(
        registry,
        sets=[
            "device=cuda:1",
            'dtype="float64"',
            "weight_decay=1e-3",
            "batch={start = 5}",
            "damping.pi=net",
            " seed = 4",
            "averaging.decay=0",
        ],
    )
    assert (config.device, config.dtype, config.weight_decay, config.seed) == ("cuda:1", "float64", 1e-3, 4)
    assert (config.batch.start, config.batch.target_step, config.damping.pi) == (5, 500, "net")
    assert config.averaging.decay == 0.0


def test_none_is_written_by_its_word(registry, write) -> None:
    file = write('threads = "none"\n[damping]\ngamma_max = "none"\n')
    for config in (
        resolve(registry, files=[file]),
        resolve(registry, sets=["damping.gamma_max=none", "threads=none"]),
        resolve(registry, sets=['damping.gamma_max="none"'], flags={"threads": "none"}),
    ):
        assert (config.damping.gamma_max, config.threads) == (None, None)
        assert read_saved(registry, config.as_dict()) == config
    # the name of a component is a name
    assert resolve(registry, sets=["momentum=none"]).momentum.kind == "none"


def test_a_saved_configuration_is_a_file_too(registry, write) -> None:
    config = resolve(registry, flags={"optimizer": "nesterov", "steps": 12})
    file = write(json.dumps(config.as_dict()), "config.json")
    assert resolve(registry, files=[file]) == config
    assert resolve(registry, files=[file], flags={"steps": 13}).steps == 13


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sets": ["steps"]}, r"--set steps: needs the form KEY=VALUE"),
        ({"sets": ["=3"]}, r"--set =3: '' is not a key"),
        ({"sets": ["damping..pi=3"]}, r"'damping\.\.pi' is not a key"),
        ({"sets": ["stepps=3"]}, r"--set stepps=3: unknown key 'stepps', did you mean 'steps'\?"),
        ({"sets": ["tau1=0.5"]}, r"unknown key 'tau1', did you mean 'estimator\.tau1'\?"),
        ({"sets": ["lambda0=3"]}, r"--set lambda0=3: unknown key 'lambda0', did you mean 'damping\.lambda0'\?$"),
        ({"sets": ["lamda0=3"]}, r"unknown key 'lamda0', did you mean 'damping\.lambda0'\?"),
        ({"sets": ["gamma_max=3"]}, r"did you mean 'damping\.gamma_max' \(levenberg-marquardt\)\?"),
        ({"sets": ["lr=3"]}, r"did you mean 'optimizer\.lr' \(.*sgd.*\) or 'momentum\.lr' \(fixed\)\?"),
        ({"sets": ["every=3"]}, r"did you mean 'eval\.every' or 'checkpoint\.every' or 'optimizer\.every' \(guest\)\?"),
        ({"sets": ["xyzzy=3"]}, r"unknown key 'xyzzy', known: approx, .*weight_decay"),
        (
            {"sets": ["optimizer.lambda0=3"]},
            r"unknown key 'lambda0' in optimizer, known: autocast, output, reduce, unsupported .*'damping\.lambda0'",
        ),
        (
            {"sets": ["damping.gamma_every=none"]},
            r"damping\.gamma_every = 'none': this key cannot be none; input should be a v",
        ),
        ({"sets": ["threads=all"]}, r"threads = 'all': input should be a valid integer \(or none\)"),
        ({"sets": ["steps=[1"]}, r"--set steps=\[1: the value is not valid TOML"),
        ({"sets": ["steps=1\nseed=2"]}, r"one value is needed"),
        ({"sets": ["steps="]}, r"the value is not valid TOML"),
        ({"sets": ["steps=-1"]}, r"--set steps=-1: steps = -1: input should be greater than or equal to 1"),
        ({"sets": ["steps=true"]}, r"steps = True: input should be a valid integer"),
        ({"sets": ["steps=many"]}, r"steps = 'many': input should be a valid integer"),
        ({"sets": ["weight_decay=nan"]}, r"weight_decay = nan: input should be a finite number"),
        ({"sets": ["dtype=float16"]}, r"dtype = 'float16' is not known, did you mean 'float64'|'float32'"),
        ({"sets": ["device=../x"]}, r"--set device=\.\./x: device = '\.\./x': not the name of a device"),
        ({"sets": ["batch=5"]}, r"--set batch=5: batch = 5: needs a table with the keys schedule, start, target_step"),
        ({"sets": ["batch.strat=5"]}, r"unknown key 'strat' in batch, did you mean 'start'\?"),
        ({"sets": ["batch.start.x=5"]}, r"batch\.start = \{'x': 5\}: input should be a valid integer"),
        ({"sets": ["damping.pi=false"]}, r"damping.pi = False is not known, known: layer, net, none \("),
        ({"sets": ["damping.pi=nett"]}, r"damping.pi = 'nett' is not known, did you mean 'net'\? \("),
        ({"sets": ["batch.schedule=exponentail"]}, r"'exponentail' is not known, did you mean 'exponential'\?"),
        ({"sets": ["batch.target_step=1"]}, r"batch\.target_step = 1: input should be greater"),
        ({"sets": ["averaging.decay=1.0"]}, r"averaging\.decay = 1\.0: input should be less than 1"),
        ({"sets": ["approx=3"]}, r"--set approx=3: approx = 3: needs a name or a table with kind"),
        ({"sets": ["approx.kind=3"]}, r"approx\.kind = 3 is not a name, known: blockdiag, .*tridiag"),
        ({"sets": ["sink=[3]"]}, r"sink = 3: needs a name"),
        ({"sets": ["sink={}"]}, r"--set sink=\{\}: sink needs a kind"),
        ({"sets": ["sink.kind=jsonl", "sink.pth=3"]}, r"--set sink\.pth=3: unknown key 'pth' in sink"),
        ({"sets": ["approx=tridag"]}, r"--set approx=tridag: unknown approx 'tridag', did you mean 'tridiag'\?"),
        ({"sets": ["damping.lamda0=3"]}, r"--set damping\.lamda0=3: unknown key 'lamda0' in damping, did you mean"),
        (
            {"sets": ["damping.lambda0=-3"]},
            r"--set damping\.lambda0=-3: damping\.lambda0 = -3: input should be greater",
        ),
        ({"sets": ["preset=papr"]}, r"--set preset=papr: unknown preset 'papr', did you mean 'paper'\?"),
        ({"sets": ["preset=3"]}, r"--set preset=3: unknown preset '3'"),
        ({"preset": "papr"}, r"--preset: unknown preset 'papr'"),
        ({"flags": {"problem": "curvs"}}, r"--problem: unknown problem 'curvs', did you mean 'curves'\?"),
        ({"flags": {"problem.data_dir": 3}}, r"--data-dir: problem\.data_dir = 3: input should be a valid string"),
        ({"flags": {"optimizer": "kfaq"}}, r"--optimizer: unknown optimizer 'kfaq', did you mean 'kfac'\?"),
        ({"flags": {"nonsense": 3}}, r"--nonsense: unknown key 'nonsense'"),
        (
            {"flags": {"optimizer": "nesterov", "approx": "tridiag"}},
            r"--approx: the optimizer 'nesterov' does not use approx",
        ),
        (
            {"flags": {"optimizer": "adam"}, "sets": ["damping.pi=net"]},
            r"--set damping\.pi=net: .*'adam' does not use",
        ),
    ],
)
def test_mistakes_are_answered_in_a_line_with_their_origin(registry, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(registry, **given)
    assert len(str(caught.value).splitlines()) <= 2
    assert "pydantic" not in str(caught.value)


def test_several_mistakes_are_counted(registry) -> None:
    with pytest.raises(ConfigError, match=r"(?s)batch\.start.*\(and 1 more of this kind\)"):
        resolve(registry, sets=["batch.start=0", "batch.target_step=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = \n", r"run\.toml is not valid TOML: .*line 1"),
        ("lambda0 = 1\n", r"run\.toml: unknown key 'lambda0', did you mean 'damping\.lambda0'"),
        ("stepps = 1\n", r"run\.toml: unknown key 'stepps', did you mean 'steps'"),
        ("[batch]\nstart = 0\n", r"run\.toml: batch\.start = 0: "),
        ('"damping.lambda0" = 1\n', r"run\.toml: the quoted key \"damping\.lambda0\""),
        ('optimizer = "sgd"\n[approx]\nkind = "tridiag"\n', r"run\.toml: the optimizer 'sgd' does not use approx"),
        ('optimizer = "sgd"\napprox = "tridag"\n', r"does not use approx"),
    ],
)
def test_mistakes_in_a_file_name_the_file(registry, write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(registry, files=[write(text)])


def test_files_that_cannot_be_read(registry, tmp_path: Path, write) -> None:
    with pytest.raises(ConfigError, match=r"there is no configuration file '.*missing\.toml'"):
        resolve(registry, files=[tmp_path / "missing.toml"])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        resolve(registry, files=[tmp_path])
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"steps = 1\xff\n")
    with pytest.raises(ConfigError, match="not a text file in UTF-8, found byte 9"):
        resolve(registry, files=[binary])
    with pytest.raises(ConfigError, match=r"list\.json holds a list"):
        resolve(registry, files=[write("[1]", "list.json")])
    with pytest.raises(ConfigError, match=r"cut\.json is not valid JSON"):
        resolve(registry, files=[write('{"steps": ', "cut.json")])


def test_saved_configurations_are_checked(registry) -> None:
    saved = resolve(registry).as_dict()
    cases = {
        "unknown key 'stepps'": {**saved, "stepps": 3},
        "unknown approx 'gone'": {**saved, "approx": {"kind": "gone"}},
        "approx is missing, the optimizer 'kfac' uses it": {**saved, "approx": None},
        "does not use estimator": {**saved, "optimizer": {"kind": "sgd"}},
        "problem is missing": {**saved, "problem": None},
        "steps = 0": {**saved, "steps": 0},
        "preset = 3 is not a name": {**saved, "preset": 3},
    }
    for message, values in cases.items():
        with pytest.raises(ConfigError, match=f"saved configuration: .*{message}"):
            read_saved(registry, values)
    # A preset that later versions drop must not make old runs unreadable.
    assert read_saved(registry, {**saved, "preset": "retired"}).preset == "retired"


def test_component_of_a_broken_plugin(install_plugin) -> None:
    install_plugin("bad_four", "import surely_not_installed")
    with pytest.raises(PluginError, match=r"--approx: unknown approx 'zzz'(?s:.*)'bad_four'.*surely_not_installed"):
        resolve(get_registry(), flags={"approx": "zzz"})


def test_third_party_component_in_a_run(install_plugin) -> None:
    install_plugin(
        "third_one",
        """
        from typing import Literal
        from kfacore.plugin import ApproxConfig, Component, OptimizerConfig, hookimpl

        class DiagonalConfig(ApproxConfig):
            kind: Literal["diagonal-test"] = "diagonal-test"
            floor: float = 0.5

        class HalfConfig(OptimizerConfig):
            kind: Literal["half-test"] = "half-test"

        @hookimpl
        def kfac_components():
            return [
                Component("approx", "diagonal-test", DiagonalConfig, "third_one:D", "Diagonal."),
                Component("optimizer", "half-test", HalfConfig, "third_one:H", "H.", uses=frozenset({"approx"})),
            ]
        """,
    )
    registry = get_registry()
    flags = {"optimizer": "half-test", "approx": "diagonal-test"}
    config = resolve(registry, preset="paper", flags=flags, sets=["approx.floor=0.25"])
    assert (config.approx.floor, config.approx.refresh_every, config.damping) == (0.25, 20, None)
    saved = config.as_dict()["approx"]
    assert (saved["kind"], saved["refresh_every"], saved["floor"]) == ("diagonal-test", 20, 0.25)
    assert read_saved(registry, config.as_dict()) == config
    with pytest.raises(ConfigError, match=r"'half-test' does not use damping \(it uses approx\)"):
        resolve(registry, flags={**flags, "damping": "fixed"})


def test_slots_and_fields_agree() -> None:
    assert set(SLOTS) - set(RunConfig.model_fields) == {"executor", "layer"}  # of a study; all are taken
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []
