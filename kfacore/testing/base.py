"""What all suites share: the component by name, its manifest and its config model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.plugin import SLOTS, Component
from kfacore.registry import get_registry
from kfacore.schema.slots import SlotConfig

__all__ = ["ComponentSuite", "devices", "differs", "reload", "same"]


def devices() -> list[str]:
    """Every device that a suite runs on: the CPU, and CUDA where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def differs(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in double precision; infinite where found is not finite."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))


def reload(state: Any) -> Any:
    """The state as it comes back from a file that may hold no code (``torch.load(weights_only=True)``)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@cache
def _fresh(*modules: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that has imported the modules; its last word is whether torch is loaded."""
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _torch_after_importing(module: str) -> bool:
    """Whether torch is loaded once a fresh interpreter has imported the module.

    One process for all that are registered of its package; what is wrong with one is found in its own.
    """
    registry, package = get_registry(), module.partition(".")[0]
    modules = {component.config.__module__ for slot in SLOTS for component in registry.components(slot)}
    modules = {each for each in modules if each.partition(".")[0] == package}
    together = _fresh(*sorted(modules | {module}))
    if together.returncode == 0 and together.stdout.split()[-1] == "False":
        return False
    done = _fresh(module)
    assert done.returncode == 0, f"a fresh Python cannot import {module}:\n{done.stderr}"
    return done.stdout.split()[-1] == "True"


class ComponentSuite:
    """A registered component, found and built as users do it.

    Attributes:
        slot: The role's slot; set by the suite of the role.
        name: The component's name; set by the author.
        options: Options of its table that the tests use; its defaults if left out.
    """

    slot: ClassVar[str]
    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    @property
    def component(self) -> Component:
        """The manifest."""
        return get_registry().find(self.slot, self.name)

    def make_config(self, **options: Any) -> SlotConfig:
        """The config object with `options`, overridden by the given ones."""
        return get_registry().config(self.slot, {"kind": self.name, **self.options, **options})

    def build(self, **options: Any) -> Any:
        """A fresh instance with `options`, overridden by the given ones."""
        return get_registry().build(self.slot, {"kind": self.name, **self.options, **options})

    def test_manifest_finds_the_class(self) -> None:
        """The registry can import the target, and it plays the role."""
        found = type(self.build())
        assert get_registry().load(self.component) is found

    def test_manifest_imports_no_torch(self) -> None:
        """Listing and help read every manifest: the module of the config model must stay light."""
        module = self.component.config.__module__
        assert not _torch_after_importing(module), (
            f"importing {module}, where the config model {self.component.config.__name__} is, imports torch; keep "
            "config and manifest in a module of their own and name the class by 'module:Class'"
        )

    def test_config_has_a_json_schema(self) -> None:
        """Editors and `kfac show` read it: every option is described."""
        schema = self.component.config.model_json_schema()
        json.dumps(schema)
        options = {key: entry for key, entry in schema["properties"].items() if key != "kind"}  # the name speaks itself
        silent = [key for key, entry in options.items() if not entry.get("description")]
        assert not silent, f"options without help: {', '.join(silent)}; write a docstring below each attribute"

    def test_config_survives_being_saved(self) -> None:
        """The resolved configuration is saved with every run and read again."""
        config = self.make_config()
        saved = json.loads(json.dumps(config.model_dump(mode="json")))
        assert type(config).model_validate(saved) == config, "the config comes back from JSON as another one"

    def test_unknown_options_are_refused(self) -> None:
        """A mistyped option must not be ignored."""
        with pytest.raises(ConfigError):
            self.build(no_such_option_exists=1)
