"""`kfac list`, `show`, `plugins`, `doctor` and `schema`: what they answer, and that they answer without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from patience import PATIENCE
from typer.testing import CliRunner

import kfacore
from kfac_cli.main import app
from kfacore.errors import ConfigError
from kfacore.lab.config.run import RunConfig
from kfacore.plugin import SLOTS
from kfacore.registry import get_registry
from kfacore.schema.presets import PRESETS
from kfacore.schema.table import RUN_SLOTS

BROKEN = "raise RuntimeError('out of order')"

SOUND = """
    from typing import Literal
    from kfacore.plugin import Component, LikelihoodConfig, hookimpl

    class PoissonConfig(LikelihoodConfig):
        kind: Literal["poisson"] = "poisson"

    @hookimpl
    def kfac_components():
        return [Component("likelihood", "poisson", PoissonConfig, "m:P", "Counts.")]
"""


def ask(*arguments: str, code: int = 0) -> str:
    """The command's answer on stdout."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code
    return result.stdout


def test_list_has_every_component_under_its_slot() -> None:
    lines = ask("list").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(SLOTS)
    for slot in SLOTS:
        for component in get_registry().components(slot):
            [line] = [line for line in lines if line.split()[:1] == [component.name] and component.summary in line]
            assert line.startswith("  ")


def test_list_of_a_slot() -> None:
    lines = ask("list", "approx").splitlines()
    assert lines[0] == "approx"
    assert [line.split()[0] for line in lines[1:]] == [item.name for item in get_registry().components("approx")]
    found = json.loads(ask("list", "approx", "--json"))
    assert {"blockdiag", "tridiag"} <= {item["name"] for item in found}
    assert {item["slot"] for item in found} == {"approx"}
    assert {item["plugin"] for item in found} == {"builtin"}
    with pytest.raises(ConfigError, match="unknown slot 'aprox', did you mean 'approx'"):
        ask("list", "aprox")


def test_list_says_where_others_come_from_and_what_is_broken(install_plugin) -> None:
    install_plugin("sound_two", SOUND)
    install_plugin("broken_one", BROKEN)
    result = CliRunner().invoke(app, ["list", "likelihood"], catch_exceptions=False)
    assert "Counts. [sound-two 1.2]" in result.stdout
    assert "note: plug-in 'broken_one' (broken-one 1.2" in result.stderr
    assert "broken_one" not in result.stdout


def test_show_lists_keys_with_type_default_and_help() -> None:
    shown = ask("show", "damping/levenberg-marquardt")
    assert "damping.lambda0  (float > 0.0 | none, default 150.0)" in shown
    assert "damping.lambda_every  (int >= 1, default 5)\n      Steps between" in shown
    assert "damping.pi  ('layer' | 'net' | none, default \"layer\")" in shown
    assert "kfac_plugins.damping" in shown
    assert "kfacore " + kfacore.__version__ in shown


def test_show_as_json() -> None:
    found = json.loads(ask("show", "optimizer/kfac", "--json"))
    assert found["uses"] == ["approx", "damping", "estimator", "momentum", "trust"]
    found = json.loads(ask("show", "problem/curves", "--json"))
    assert found["suggests"]["likelihood"] == {"kind": "bernoulli"}
    found = json.loads(ask("show", "approx/tridiag", "--json"))
    assert found["distribution"] == "kfacore"
    [key] = [key for key in found["keys"] if key["key"] == "refresh_every"]
    assert (key["type"], key["default"]) == ("int >= 1", 20)
    assert key["help"].startswith("Steps between")


def test_every_component_can_be_shown_and_documents_every_key() -> None:
    for slot in SLOTS:
        for component in get_registry().components(slot):
            found = json.loads(ask("show", f"{slot}/{component.name}", "--json"))
            assert [key["key"] for key in found["keys"] if not key["help"]] == []
            assert component.summary in ask("show", f"{slot}/{component.name}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tridiag", "'tridiag' needs its slot: kfac show approx/tridiag"),
        ("fixed", "kfac show damping/fixed or kfac show momentum/fixed"),
        ("approx", "'approx' is a slot: kfac list approx"),
        ("nonsense", "not of the form SLOT/NAME"),
        ("approx/tridag", "unknown approx 'tridag', did you mean 'tridiag'"),
        ("aprox/tridiag", "unknown slot 'aprox'"),
    ],
)
def test_show_refuses(what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask("show", what)


def test_plugins(install_plugin, monkeypatch) -> None:
    install_plugin("sound_three", SOUND)
    file = install_plugin("broken_two", BROKEN)
    shown = ask("plugins")
    assert f"builtin  ok  (kfacore {kfacore.__version__})" in shown
    assert "offers: likelihood/poisson" in shown
    assert (
        f"broken_two  broken  (broken-two 1.2)\n  file: {file}\n  reason: import failed: RuntimeError: out of" in shown
    )
    found = {item["name"]: item for item in json.loads(ask("plugins", "--json"))}
    assert found["sound_three"]["components"] == ["likelihood/poisson"]
    assert (found["broken_two"]["state"], found["broken_two"]["distribution"]) == ("broken", "broken-two")


def test_doctor() -> None:
    import torch

    found = json.loads(ask("doctor", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["kfacore"] == kfacore.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["devices"][0].startswith("cpu")
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert {"curves", "mnist", "faces"} <= {item["problem"] for item in found["data"]}
    assert {item["state"] for item in found["data"]} <= {"verified", "unverified", "corrupt", "missing", "generated"}
    assert found["problems"] == []
    shown = ask("doctor")
    for title in ("versions", "machine", "data", "plug-ins", "problems"):
        assert f"{title}\n" in shown
    assert shown.endswith("  none found\n")


def test_doctor_reports_broken_plugins(install_plugin) -> None:
    install_plugin("broken_three", BROKEN)
    [problem] = json.loads(ask("doctor", "--json", code=1))["problems"]
    assert "plug-in 'broken_three' (broken-three 1.2" in problem
    assert "out of order" in problem
    assert problem in ask("doctor", code=1)


def test_schema_allows_what_files_allow() -> None:
    schema = json.loads(ask("schema"))
    properties = schema["properties"]
    assert set(properties) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert "required" not in schema
    assert properties["preset"]["enum"] == sorted(PRESETS)
    names = {slot: [item.name for item in get_registry().components(slot)] for slot in RUN_SLOTS}
    for slot in RUN_SLOTS:
        name, *tables = properties[slot]["anyOf"]
        assert name == {"type": "string", "enum": sorted(names[slot])}
        tables = [table for table in tables if "$ref" in table]
        kinds = [schema["$defs"][table["$ref"].rpartition("/")[2]]["properties"]["kind"]["const"] for table in tables]
        assert sorted(kinds) == sorted(names[slot])
        assert properties[slot]["description"]
    assert properties["sink"]["anyOf"][-1]["type"] == "array"
    tridiag = get_registry().find("approx", "tridiag").config.__name__
    assert schema["$defs"][tridiag]["properties"]["refresh_every"]["minimum"] == 1


SCRIPT = """
import contextlib, io, json, os, sys

def ask(*arguments, **environ):
    from kfac_cli.main import main
    sys.argv = ["kfac", *arguments]
    os.environ.update(environ)
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        try:
            main()
        except SystemExit as left:
            assert not left.code, (arguments, left.code)
    for name in environ:
        del os.environ[name]
    return answer.getvalue()

answers = [
    ask("--help"), ask("--version"), ask("list"), ask("list", "approx", "--json"), ask("show", "approx/tridiag"),
    ask("show", "problem/mnist"), ask("plugins"), ask("schema"), ask("train", "--help"), ask("doctor", "--help"),
    ask(_KFAC_COMPLETE="complete_bash", COMP_WORDS="kfac show approx/tri", COMP_CWORD="2"),
]
loaded = sorted({name.partition(".")[0] for name in sys.modules})
json.dump({"answers": answers, "loaded": loaded, "plugins": json.loads(ask("plugins", "--json"))}, sys.stdout)
"""


def fresh_process() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_light_commands_import_neither_torch_nor_matplotlib() -> None:
    found = fresh_process()
    assert all(found["answers"])
    assert found["answers"][-1].split() == ["approx/tridiag"]
    assert {"torch", "matplotlib", "numpy", "rich"} & set(found["loaded"]) == set()


def test_a_manifest_that_imports_torch_is_found_out(install_plugin, monkeypatch) -> None:
    # A stand-in for torch: the real one would be slow, and the check goes by the name.
    file = install_plugin("heavy_one", "import torch\n" + textwrap.dedent(SOUND))
    file.with_name("torch.py").write_text("", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(file.parent))
    [plugin] = [plugin for plugin in fresh_process()["plugins"] if plugin["name"] == "heavy_one"]
    assert plugin["state"] == "broken"
    assert "imports torch" in plugin["reason"]
