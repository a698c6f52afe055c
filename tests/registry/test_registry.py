"""The registry against plug-ins that are sound, broken in every way we could think of, or in each other's way."""

from __future__ import annotations

import re
import sys

import pytest

from kfacore.errors import ConfigError, PluginError
from kfacore.plugin import SLOTS, Component
from kfacore.registry import DISABLE_VARIABLE, PluginStatus, get_registry, reset_registry
from kfacore.schema.slots import ApproxConfig, LikelihoodConfig

SOUND = """
    from typing import Literal
    from kfacore.plugin import Component, LikelihoodConfig, hookimpl

    class PoissonConfig(LikelihoodConfig):
        kind: Literal["poisson"] = "poisson"
        rate: float = 1.0

    @hookimpl
    def kfac_components():
        return [Component("likelihood", "poisson", PoissonConfig, "{target}", "Counts.")]
"""

HEAD = """
    from typing import ClassVar, Literal
    from pydantic import BaseModel
    from kfacore.plugin import ApproxConfig, Component, LikelihoodConfig, OptimizerConfig, hookimpl

    class PoissonConfig(LikelihoodConfig):
        kind: Literal["poisson"] = "poisson"
"""


def status(name: str) -> PluginStatus:
    return next(plugin for plugin in get_registry().plugins() if plugin.name == name)


def assert_builtins_work() -> None:
    registry = get_registry()
    builtin = registry.plugins()[0]
    assert (builtin.name, builtin.distribution, builtin.state) == ("builtin", "kfacore", "ok")
    assert registry.find("likelihood", "bernoulli").name == "bernoulli"


def test_every_slot_has_builtin_components() -> None:
    registry = get_registry()
    assert [slot for slot in SLOTS if not registry.components(slot)] == []
    assert registry.plugins()[0].reason == ""


def test_every_builtin_target_loads_and_builds_from_its_defaults() -> None:
    registry = get_registry()
    for slot in SLOTS:
        for component in registry.components(slot):
            target = registry.load(component)
            if slot != "optimizer":
                assert isinstance(registry.build(slot, component.name), target)


def test_sound_plugin_is_offered(install_plugin) -> None:
    module = install_plugin("sound_one", SOUND.format(target="sound_one:Poisson"))
    assert status("sound_one") == PluginStatus(
        "sound_one", "sound-one", "1.2", str(module), "ok", "", ("likelihood/poisson",)
    )
    component = get_registry().find("likelihood", "poisson")
    assert get_registry().origin(component).distribution == "sound-one"
    assert_builtins_work()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import surely_not_installed", "import failed: ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("raise SystemExit('no licence')", "import failed: SystemExit: no licence"),
        ("def broken(:", "import failed: .*SyntaxError"),
        (HEAD + "    KFAC_API = 0\n", "plug-in API 0, this kfacore has 1: upgrade bad-one"),
        (HEAD + "    KFAC_API = 99\n", "plug-in API 99, this kfacore has 1: upgrade kfacore"),
        ("", "implements no hook"),
        (HEAD + "    def kfac_components():\n        return []\n", "implements no hook"),
        (HEAD + "    @hookimpl\n    def kfac_components(wrong):\n        return []\n", "hooks do not fit.*wrong"),
        (HEAD + "    @hookimpl\n    def kfac_componets():\n        return []\n", "hooks do not fit.*kfac_componets"),
        (HEAD + "    @hookimpl\n    def kfac_components():\n        return []\n", "returned no components"),
        (
            HEAD + "    @hookimpl\n    def kfac_components():\n        return 3\n",
            "kfac_components\\(\\) failed: TypeError",
        ),
        (HEAD + "    @hookimpl\n    def kfac_components():\n        return ['x']\n", "returned 'x', not a"),
        (HEAD + "    @hookimpl\n    def kfac_components():\n        1 / 0\n", "failed: ZeroDivisionError.*line 10 of"),
        ("import torch\n", "imports torch"),
        ("from kfacore.roles import Likelihood\n", "imports torch"),
    ],
)
def test_broken_plugin_is_named_and_nothing_else_suffers(install_plugin, source: str, reason: str) -> None:
    import torch  # noqa: F401  # the harder case for noticing that a manifest imports torch

    module = install_plugin("bad_one", source)
    found = status("bad_one")
    assert (found.distribution, found.version, found.state) == ("bad-one", "1.2", "broken")
    assert found.file == str(module)
    assert re.search(reason, found.reason), found.reason
    assert "\n" not in found.reason
    assert found.components == ()
    assert_builtins_work()


@pytest.mark.parametrize(
    ("component", "reason"),
    [
        ("Component('likelyhood', 'poisson', PoissonConfig, 'm:P', 'x')", "unknown slot 'likelyhood', did you mean"),
        ("Component([], 'poisson', PoissonConfig, 'm:P', 'x')", "unknown slot \\[\\]"),
        ("Component('likelihood', 'a/b', PoissonConfig, 'm:P', 'x')", "the name 'a/b'"),
        ("Component('likelihood', 'poisson', PoissonConfig, 'm.P', 'x')", "target 'm.P' is not of the form"),
        ("Component('likelihood', 'poisson', PoissonConfig, None, 'x')", "target None"),
        ("Component('likelihood', 'poisson', PoissonConfig, 'm:P', '')", "summary '' is not one line"),
        ("Component('likelihood', 'poisson', PoissonConfig, 'm:P', 'x', uses={'approx'})", "for optimizers only"),
        ("Component('likelihood', 'poisson', PoissonConfig, 'm:P', 'x', uses=3)", "`uses` is 3"),
        ("Component('optimizer', 'o', PoissonConfig, 'm:P', 'x', uses={'aprox'})", "unknown slot 'aprox', did you"),
        ("Component('optimizer', 'o', PoissonConfig, 'm:P', 'x', uses=[[]])", "manifest cannot be read: TypeError"),
        ("Component('likelihood', 'poisson', dict, 'm:P', 'x')", "not a pydantic model"),
        ("Component('likelihood', 'poisson', PoissonConfig(), 'm:P', 'x')", "not a pydantic model"),
        ("Component('approx', 'poisson', PoissonConfig, 'm:P', 'x')", "does not derive from .*ApproxConfig"),
        ("Component('likelihood', 'binomial', PoissonConfig, 'm:P', 'x')", "kind is 'poisson', not .*'binomial'"),
        ("Component('likelihood', 'free', Free, 'm:P', 'x')", "not annotated Literal\\['free'\\]"),
        ("Component('likelihood', 'loose', Loose, 'm:P', 'x')", "must keep extra='forbid'"),
        ("Component('likelihood', 'needy', Needy, 'm:P', 'x')", "defaults: 'rate' is missing"),
        ("Component('likelihood', 'secret', Secret, 'm:P', 'x')", "does not survive being saved"),
        ("Component('likelihood', 'odd', Odd, 'm:P', 'x')", "cannot be built, saved and described: RuntimeError: no"),
    ],
)
def test_wrong_manifest_is_refused_and_its_sound_sibling_kept(install_plugin, component: str, reason: str) -> None:
    install_plugin(
        "mixed_one",
        HEAD
        + f"""
    class ScaledConfig(LikelihoodConfig):
        kind: Literal["scaled"] = "scaled"

    class Free(LikelihoodConfig):
        kind: str = "free"

    class Loose(LikelihoodConfig):
        model_config = {{"extra": "allow"}}
        kind: Literal["loose"] = "loose"

    class Needy(LikelihoodConfig):
        kind: Literal["needy"] = "needy"
        rate: float

    class Opaque:
        pass

    from pydantic import Field, SecretStr

    class Secret(LikelihoodConfig):
        kind: Literal["secret"] = "secret"
        token: SecretStr = SecretStr("hidden")

    class Odd(LikelihoodConfig):
        kind: Literal["odd"] = "odd"

        def model_post_init(self, context):
            raise RuntimeError("no")

    @hookimpl
    def kfac_components():
        return [
            {component},
            Component("likelihood", "scaled", ScaledConfig, "mixed_one:Scaled", "Sound."),
        ]
    """,
    )
    found = status("mixed_one")
    assert found.state == "broken"
    assert re.search(reason, found.reason), found.reason
    assert found.components == ("likelihood/scaled",)
    assert get_registry().find("likelihood", "scaled").name == "scaled"
    assert_builtins_work()


def test_naming_a_refused_component_names_the_plugin_and_the_reason(install_plugin) -> None:
    install_plugin(
        "bad_two",
        HEAD
        + "    @hookimpl\n    def kfac_components():\n"
        + "        return [Component('likelihood', 'poisson', PoissonConfig, 'nowhere', 'x')]\n",
    )
    with pytest.raises(
        PluginError, match=r"'poisson' cannot be used: plug-in 'bad_two' \(bad-two 1\.2, .*not of the form"
    ):
        get_registry().find("likelihood", "poisson")


def test_unknown_name_points_at_unreadable_plugins(install_plugin) -> None:
    install_plugin("bad_three", "import surely_not_installed")
    with pytest.raises(
        PluginError, match=r"unknown approx 'zzz'.*\n.*'bad_three' \(bad-three 1\.2.*surely_not_installed"
    ):
        get_registry().find("approx", "zzz")
    with pytest.raises(ConfigError, match="did you mean 'tridiag'"):
        get_registry().find("approx", "tridiga")


def test_two_plugins_with_one_name_are_both_reported_and_neither_is_chosen(install_plugin, monkeypatch) -> None:
    install_plugin("rival_a", SOUND.format(target="rival_a:Poisson"))
    install_plugin("rival_b", SOUND.format(target="rival_b:Poisson"))
    assert "'rival_b' (rival-b)" in status("rival_a").reason
    assert "'rival_a' (rival-a)" in status("rival_b").reason
    with pytest.raises(PluginError, match=r"rival_a.*rival_b"):
        get_registry().find("likelihood", "poisson")
    monkeypatch.setenv(DISABLE_VARIABLE, "rival_a")
    reset_registry()
    assert get_registry().find("likelihood", "poisson").target == "rival_b:Poisson"


def test_builtin_name_stays_with_the_builtin(install_plugin) -> None:
    install_plugin("rival_c", SOUND.format(target="rival_c:P").replace("poisson", "bernoulli"))
    assert "likelihood/bernoulli: the name is also offered by the plug-in 'builtin'" in status("rival_c").reason
    assert get_registry().find("likelihood", "bernoulli").target.startswith("kfac_plugins.")
    assert_builtins_work()


def test_a_component_offered_twice_by_one_plugin(install_plugin) -> None:
    install_plugin(
        "twice_one",
        HEAD
        + "    @hookimpl\n    def kfac_components():\n"
        + "        return [Component('likelihood', 'poisson', PoissonConfig, 'm:P', 'x')] * 2\n",
    )
    assert "offered twice" in status("twice_one").reason


def test_one_plugin_name_in_two_distributions(install_plugin) -> None:
    install_plugin("same_a", SOUND.format(target="same_a:P"), entry="same")
    install_plugin("same_b", SOUND.format(target="same_b:P").replace("poisson", "other"), entry="same")
    first, second = [plugin for plugin in get_registry().plugins() if plugin.name == "same"]
    assert (first.distribution, first.state) == ("same-a", "ok")
    assert (second.distribution, second.state) == ("same-b", "broken")
    assert "taken by same-a 1.2" in second.reason


def test_switching_off(install_plugin, monkeypatch) -> None:
    install_plugin("off_one", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv(DISABLE_VARIABLE, "off_one, nothere")
    reset_registry()
    assert (status("off_one").state, status("off_one").reason) == ("disabled", f"switched off by {DISABLE_VARIABLE}")
    assert "no such plug-in is installed" in status("nothere").reason
    assert "off_one" not in sys.modules
    monkeypatch.setenv(DISABLE_VARIABLE, "off-one")  # the distribution's name does as well
    reset_registry()
    assert status("off_one").state == "disabled"


def test_leftovers_of_broken_installations(install_plugin) -> None:
    site = install_plugin("sound_four", SOUND.format(target="sound_four:P")).parent
    (site / "left_over-1.dist-info").mkdir()
    (site / "torn-1.dist-info").mkdir()
    (site / "torn-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 1\n")
    (site / "torn-1.dist-info" / "entry_points.txt").write_text("[kfac]\nno equals sign\n")
    reset_registry()
    assert (status("torn").state, status("torn").version) == ("broken", "1")
    assert "entry_points.txt is malformed" in status("torn").reason
    assert status("sound_four").state == "ok"
    assert_builtins_work()


def test_the_first_of_two_copies_on_the_path_counts(install_plugin, monkeypatch, tmp_path) -> None:
    site = install_plugin("sound_five", SOUND.format(target="sound_five:P")).parent
    older = tmp_path / "older" / "sound_five-0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: Sound.Five\nVersion: 0.1\n")
    (older / "entry_points.txt").write_text("[kfac]\nsound_five = missing\n")
    monkeypatch.syspath_prepend(str(older.parent))
    monkeypatch.syspath_prepend(str(site))
    reset_registry()
    assert (status("sound_five").version, status("sound_five").state) == ("1.2", "ok")
    assert len([plugin for plugin in get_registry().plugins() if plugin.name == "sound_five"]) == 1


def test_prints_of_a_plugin_stay_out_of_stdout(install_plugin, capsys) -> None:
    install_plugin("loud_one", "print('hello')\n" + HEAD.replace("\n    ", "\n"))
    get_registry().plugins()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_find_and_components_refuse_unknown_slots() -> None:
    with pytest.raises(ConfigError, match="unknown slot 'aprox', did you mean 'approx'"):
        get_registry().components("aprox")
    with pytest.raises(ConfigError, match="unknown slot"):
        get_registry().find("aprox", "tridiag")


@pytest.mark.parametrize(
    ("body", "target", "message"),
    [
        ("", "target_one:Missing", "cannot be imported: AttributeError"),
        ("", "target_one.deeper:Missing", "there is no module 'target_one.deeper'"),
        ("", "surely_not_installed:Missing", "there is no module 'surely_not_installed'"),
        ("import surely_not_installed", "target_one:P", "needs the package 'surely_not_installed'"),
        ("raise SystemExit(3)", "target_one:P", "cannot be imported: SystemExit: 3"),
        ("class P: pass", "target_one:P", "is not a subclass of kfacore.roles.Likelihood"),
        ("P = 3", "target_one:P", "is not a subclass"),
        ("from kfacore.roles import Likelihood as P", "target_one:P", "does not implement .*nll"),
        (
            "from kfac_plugins.likelihoods.bernoulli import Bernoulli\nclass P(Bernoulli): pass",
            "target_one:P",
            "must set Config = PoissonConfig",
        ),
        (
            "from kfac_plugins.likelihoods.bernoulli import Bernoulli\nimport manifest_one\n"
            "class P(Bernoulli):\n    Config = manifest_one.PoissonConfig\n"
            "    def __init__(self, a, b): pass",
            "target_one:P",
            "cannot be built: TypeError",
        ),
    ],
)
def test_wrong_targets_are_named_when_they_are_built(install_plugin, body: str, target: str, message: str) -> None:
    module = install_plugin("manifest_one", SOUND.format(target=target))
    module.with_name("target_one.py").write_text(body, encoding="utf-8")
    assert status("manifest_one").state == "ok"
    with pytest.raises(PluginError, match=rf"likelihood/poisson of plug-in 'manifest_one'.*{message}"):
        get_registry().build("likelihood", "poisson")


def test_config_from_name_table_and_object() -> None:
    registry = get_registry()
    by_name = registry.config("approx", "tridiag")
    assert isinstance(by_name, ApproxConfig)
    assert registry.config("approx", {"kind": "tridiag"}) == by_name
    assert registry.config("approx", by_name) is by_name


class Strange(ApproxConfig):
    kind: str = "tridiag"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tridag", "did you mean 'tridiag'"),
        ({"refresh_every": 3}, "needs kind = a name, found no kind"),
        ({"kind": 3}, "found kind = 3"),
        ({"kind": "tridiag", "refresh_evry": 3}, "unknown key 'refresh_evry' in approx, did you mean 'refresh_every'"),
        ({"kind": "tridiag", "refresh_every": 0}, "approx.refresh_every = 0: input should be greater"),
        (LikelihoodConfig(kind="bernoulli"), "takes a ApproxConfig, found a LikelihoodConfig"),
        (Strange(), "Strange is not the config model"),
        (3, "takes a name, a table with kind, or a config object, found a int: 3"),
    ],
)
def test_config_refuses(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_registry().config("approx", value)


def test_build_takes_instances_and_refuses_the_rest() -> None:
    registry = get_registry()
    likelihood = registry.build("likelihood", {"kind": "bernoulli"})
    assert registry.build("likelihood", likelihood) is likelihood
    assert registry.build("likelihood", likelihood.config).config == likelihood.config
    with pytest.raises(ConfigError, match="instance of Likelihood, found the class Bernoulli"):
        registry.build("likelihood", type(likelihood))
    with pytest.raises(ConfigError, match="instance of Approximation, found a Bernoulli"):
        registry.build("approx", likelihood)
    with pytest.raises(ConfigError, match="for_run"):
        registry.build("optimizer", "kfac")


def test_origin_of_a_stranger() -> None:
    stranger = Component("approx", "stranger", Strange, "m:S", "x")
    with pytest.raises(ConfigError, match="approx/stranger is not a registered component"):
        get_registry().origin(stranger)
