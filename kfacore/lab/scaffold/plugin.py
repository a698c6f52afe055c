"""A complete distribution with one working component, written from the templates beside this file.

The templates are text with names between at signs (``@name@``), so that neither braces nor percent signs of the code
in them need any care.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import kfacore
from kfacore.errors import ConfigError
from kfacore.lab.scaffold.kinds import command_of, kind_of
from kfacore.plugin import API_VERSION, SLOTS, Slot

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["NewPlugin", "write_plugin"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 40
_MARK = re.compile(r"@(\w+)@")

_APPROX = {
    "readme.txt": "README.md",
    "manifest.txt": "@module@/__init__.py",
    "approximation.txt": "@module@/approximation.py",
    "tests.txt": "tests/test_@module@.py",
}
_PART = {
    "part-readme.txt": "README.md",
    "part-manifest.txt": "@module@/__init__.py",
    "@slot@.txt": "@module@/@slot@.py",
    "@slot@-tests.txt": "tests/test_@module@.py",
}
"""Template and the file made of it, for approximations and for everything else."""


@dataclass(frozen=True)
class NewPlugin:
    """What was written.

    Attributes:
        name: The component's name.
        slot: Its slot.
        command: The command that uses it.
        distribution: The distribution's name.
        module: The package's name.
        folder: Where it is.
        files: Its files, relative to the folder.
    """

    name: str
    slot: str
    command: str
    distribution: str
    module: str
    folder: Path
    files: tuple[str, ...]


def write_plugin(name: str, into: Path, registry: Registry, slot: str = "approx") -> NewPlugin:
    """Write a distribution that passes its own tests as it is.

    Args:
        name: The component's name, lower-case words with hyphens; a leading ``kfac-`` is left out.
        into: Folder in which the distribution's folder is made.
        registry: What is installed, so that no name is given twice.
        slot: What it is, one of `kfacore.lab.scaffold.kinds.KINDS`.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no template for the slot, the name cannot be used, or the folder exists; nothing has been
            written.
        OSError: The disk refused; nothing is left behind.
    """
    kind, place = kind_of(slot), SLOTS[slot]
    name = name.removeprefix("kfac-")
    _check_name(name, place)
    distribution, module = f"kfac-{name}", f"kfac_{name.replace('-', '_')}"
    _check_free(name, slot, module, registry)
    if not into.is_dir():
        what = "is not a folder" if into.exists() else "does not exist"
        raise ConfigError(f"--into {into} {what}; name the folder in which {distribution} shall be made")
    folder = into / distribution
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"{folder} exists already, and nothing is ever written over; choose another name, or another folder "
            "with --into"
        )
    words = {
        "name": name,
        "distribution": distribution,
        "module": module,
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "api": str(API_VERSION),
        "kfacore": kfacore.__version__,
        "slot": slot,
        "what": place.what,
        "title": f"{place.what} {name}" + (" of the Fisher" if slot == "approx" else ""),
        "Base": place.config.__name__,
        "Role": place.role,
        "summary": kind.summary,
        "options": kind.options,
        "defaults": kind.defaults,
        "typing": "Any, ClassVar, Literal" if kind.defaults else "Literal",
        "command": command_of(slot, name),
    }
    # Written beside its place and renamed, so that a full disk or Ctrl-C leaves no half of a distribution.
    partial = into / f".{distribution}.{os.getpid()}"
    try:
        files = _write(partial, words)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return NewPlugin(name, slot, words["command"], distribution, module, folder, files)


def _write(folder: Path, words: dict[str, str]) -> tuple[str, ...]:
    """Every file, with its names filled in."""
    templates = resources.files("kfacore.lab.scaffold") / "templates"
    written = []
    own = _APPROX if words["slot"] == "approx" else {_fill(key, words): value for key, value in _PART.items()}
    for template, target in {"pyproject.txt": "pyproject.toml", **own, "typed.txt": "@module@/py.typed"}.items():
        path = folder / _fill(target, words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_fill((templates / template).read_text(encoding="utf-8"), words), encoding="utf-8")
        written.append(path.relative_to(folder).as_posix())
    return tuple(written)


def _fill(text: str, words: dict[str, str]) -> str:
    return _MARK.sub(lambda mark: words[mark.group(1)], text)


def _check_name(name: str, slot: Slot) -> None:
    """Lower-case words of letters and digits, joined by hyphens."""
    if len(name) > _LONGEST:
        raise ConfigError(f"the name '{name}' has {len(name)} characters; use at most {_LONGEST}")
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        hint = f", for example '{better}'" if _NAME.fullmatch(better) else ""
        raise ConfigError(
            f"the name '{name}' cannot be used: a plug-in's name is made of lower-case letters, digits and single "
            f"hyphens, and starts with a letter{hint}"
        )
    if name in SLOTS:
        raise ConfigError(f"the name '{name}' is that of a slot; choose the name of one {slot.what}")


def _check_free(name: str, slot: str, module: str, registry: Registry) -> None:
    """No component, plug-in or package of the name is installed."""
    for component in registry.components(slot):
        if component.name == name:
            raise ConfigError(
                f"{slot} '{name}' exists already ({registry.origin(component)}); choose another name, two plug-ins "
                "cannot offer the same"
            )
    for plugin in registry.plugins():
        if plugin.name == name and plugin.state != "disabled":
            raise ConfigError(f"a plug-in named '{name}' is installed already ({plugin}); choose another name")
    if find_spec(module) is not None:
        raise ConfigError(f"a package named '{module}' is installed already; choose another name")
