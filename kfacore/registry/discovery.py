"""Discovery: every entry point of the group ``kfac`` is loaded on its own, and what goes wrong is kept by name.

The built-in plug-ins come the same way: an entry point of kfacore's own distribution.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from types import ModuleType
from typing import Any, Literal

import pluggy

from kfacore.errors import nearest
from kfacore.plugin import API_VERSION, PROJECT, Component, HookSpecs
from kfacore.registry.checks import check_component

__all__ = ["DISABLE_VARIABLE", "OWN_DISTRIBUTION", "Plugin", "PluginStatus", "discover"]

DISABLE_VARIABLE = "KFAC_DISABLE_PLUGINS"
"""Environment variable: names of plug-ins (or of distributions) that are not loaded, separated by commas."""

OWN_DISTRIBUTION = "kfacore"
"""The distribution whose plug-ins win a clash of names."""

_HOOK = "kfac_components"


@dataclass(frozen=True)
class PluginStatus:
    """One plug-in as `kfac plugins` shows it.

    Attributes:
        name: Name of its entry point.
        distribution: The installed distribution that brings it; empty if there is none.
        version: Version of the distribution.
        file: File of its manifest, or the entry point's value if the file is unknown.
        state: ``"ok"``, ``"broken"`` (something of it is refused) or ``"disabled"``.
        reason: What is wrong, or why it is off; empty if it is ok.
        components: What it offers, as ``"slot/name"``.
    """

    name: str
    distribution: str
    version: str
    file: str
    state: Literal["ok", "broken", "disabled"]
    reason: str
    components: tuple[str, ...]

    def __str__(self) -> str:
        """The plug-in with its culprit's address, for messages."""
        if not self.distribution:
            return f"plug-in '{self.name}'"
        return f"plug-in '{self.name}' ({self.distribution} {self.version}, {self.file})"


@dataclass
class Plugin:
    """A plug-in while it is being found.

    Attributes:
        name: Name of its entry point.
        distribution: The distribution that brings it.
        version: Version of the distribution.
        file: File of its manifest.
        components: What it offers and passed the checks.
        refused: What it offers and did not pass, by slot and name, with the reason.
        problems: Everything that is wrong.
        disabled: Whether it is switched off.
        loaded: Whether its manifests could be read at all.
    """

    name: str
    distribution: str
    version: str
    file: str
    components: list[Component] = field(default_factory=list)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    disabled: bool = False
    loaded: bool = False

    def refuse(self, component: Component, reason: str) -> None:
        """Take a component out and keep the reason."""
        self.components = [known for known in self.components if known is not component]
        self.refused[str(component.slot), str(component.name)] = reason
        self.problems.append(f"{component.slot}/{component.name}: {reason}")

    def status(self) -> PluginStatus:
        """The finished record."""
        state: Literal["ok", "broken", "disabled"] = "broken" if self.problems else "ok"
        return PluginStatus(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            file=self.file,
            state="disabled" if self.disabled else state,
            reason="; ".join(self.problems),
            components=tuple(f"{component.slot}/{component.name}" for component in self.components),
        )


def discover(environ: Mapping[str, str] | None = None) -> list[Plugin]:
    """Find and load all plug-ins; never raises for a plug-in's fault.

    Args:
        environ: Environment, for `DISABLE_VARIABLE`; the process's own by default.

    Returns:
        The plug-ins, kfacore's own first, then by name.
    """
    environ = os.environ if environ is None else environ
    switched_off = [name.strip() for name in environ.get(DISABLE_VARIABLE, "").split(",") if name.strip()]
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    plugins: list[Plugin] = []
    for plugin, entry_point in _entry_points():
        first = next((known for known in plugins if known.name == plugin.name), None)
        plugins.append(plugin)
        if plugin.name in switched_off or plugin.distribution in switched_off:
            plugin.disabled = True
            plugin.problems.append(f"switched off by {DISABLE_VARIABLE}")
        elif first is not None:
            plugin.problems.append(
                f"the plug-in name '{plugin.name}' is taken by {first.distribution} {first.version}; "
                f"switch off one distribution with {DISABLE_VARIABLE}={first.distribution}"
            )
        elif entry_point is not None:
            _load(plugin, entry_point, manager)
    _settle_clashes(plugins)
    known = {name for plugin in plugins for name in (plugin.name, plugin.distribution)}
    plugins += [_unknown_name(name, known) for name in switched_off if name not in known]
    return plugins


def _entry_points() -> list[tuple[Plugin, metadata.EntryPoint | None]]:
    """All entry points of the group; the first of several copies of a distribution on the path counts.

    A distribution whose list of entry points is malformed comes without one, and broken.
    """
    seen: set[str] = set()
    found: list[tuple[Plugin, metadata.EntryPoint | None]] = []
    for distribution in metadata.distributions():
        text = distribution.read_text("entry_points.txt") or ""
        if f"[{PROJECT}]" not in text.replace(" ", ""):  # spares reading the metadata of everything installed
            continue
        try:
            name, version = str(distribution.metadata["Name"]), str(distribution.version)
        except (KeyError, TypeError):  # newer Pythons raise where older ones say None
            name, version = "None", "None"
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if normal in seen:
            continue
        seen.add(normal)
        try:
            points = list(distribution.entry_points.select(group=PROJECT))
        except Exception as error:  # what a malformed file raises differs between Pythons
            plugin = Plugin(name, name, version, str(distribution.locate_file("")))
            plugin.problems.append(f"its entry_points.txt is malformed: {_reason(error)}")
            found.append((plugin, None))
            continue
        found += [(Plugin(point.name, name, version, point.value), point) for point in points]
    return sorted(
        found, key=lambda pair: (pair[0].distribution != OWN_DISTRIBUTION, pair[0].name, pair[0].distribution)
    )


def _load(plugin: Plugin, entry_point: metadata.EntryPoint, manager: pluggy.PluginManager) -> None:
    """Import the plug-in's module, register its hook and collect its manifests."""
    before = set(sys.modules)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers, and may be read by a program
            module = entry_point.load()
    except (Exception, SystemExit) as error:
        plugin.file = _file_of(entry_point)
        plugin.problems.append(f"import failed: {_reason(error)}")
        return
    plugin.file = getattr(module, "__file__", None) or _file_of(entry_point)
    version: Any = getattr(module, "KFAC_API", API_VERSION)
    if version != API_VERSION:
        newer = isinstance(version, int) and version > API_VERSION
        plugin.problems.append(
            f"written for plug-in API {version!r}, this kfacore has {API_VERSION}: "
            f"upgrade {'kfacore' if newer else plugin.distribution}"
        )
        return
    if _brings_torch(entry_point.module, before):
        plugin.problems.append(
            "its manifest imports torch, which every command would wait for: "
            "move what needs torch into the module that `target` names"
        )
        return
    try:
        manager.register(module, name=plugin.name)
        manager.check_pending()
    except Exception as error:  # pluggy inspects every attribute of the module, so anything can be raised
        manager.unregister(name=plugin.name)
        plugin.problems.append(f"its hooks do not fit: {_hook_reason(error)}")
        return
    if not manager.get_hookcallers(module):
        plugin.problems.append(f"implements no hook: decorate `{_HOOK}()` with kfacore.plugin.hookimpl")
        return
    _collect(plugin, module, manager)


def _collect(plugin: Plugin, module: object, manager: pluggy.PluginManager) -> None:
    """Call the hook of this plug-in alone and sort its manifests into offered and refused."""
    others = [other for other in manager.get_plugins() if other is not module]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answers = manager.subset_hook_caller(_HOOK, others)()
            components = [component for answer in answers for component in answer]
    except (Exception, SystemExit) as error:
        plugin.problems.append(f"{_HOOK}() failed: {_reason(error)}")
        return
    plugin.loaded = True
    if not components:
        plugin.problems.append(f"{_HOOK}() returned no components")
    names: set[tuple[str, str]] = set()
    for component in components:
        if not isinstance(component, Component):
            plugin.problems.append(f"{_HOOK}() returned {component!r}, not a kfacore.plugin.Component")
            continue
        key = (str(component.slot), str(component.name))
        try:
            reason = "offered twice by this plug-in" if key in names else check_component(component)
        except Exception as error:  # fields of a manifest may hold anything
            reason = f"the manifest cannot be read: {_reason(error)}"
        if reason:
            plugin.refuse(component, reason)
        else:
            names.add(key)
            plugin.components.append(component)


def _settle_clashes(plugins: Iterable[Plugin]) -> None:
    """Refuse names that two plug-ins offer: a built-in name stays with kfacore, otherwise nobody gets it."""
    owners: dict[tuple[str, str], list[tuple[Plugin, Component]]] = {}
    for plugin in plugins:
        for component in plugin.components:
            owners.setdefault((component.slot, component.name), []).append((plugin, component))
    for rivals in owners.values():
        if len(rivals) < 2:
            continue
        own = [plugin for plugin, _ in rivals if plugin.distribution == OWN_DISTRIBUTION]
        for plugin, component in rivals:
            if plugin in own[:1]:
                continue
            others = " and ".join(
                f"'{other.name}' ({other.distribution})" for other, _ in rivals if other is not plugin
            )
            plugin.refuse(
                component,
                f"the name is also offered by the plug-in {others}: rename one, "
                f"or switch one off with {DISABLE_VARIABLE}=NAME",
            )


def _unknown_name(name: str, known: Iterable[str]) -> Plugin:
    """A record for a name in `DISABLE_VARIABLE` that switches nothing off."""
    plugin = Plugin(name=name, distribution="", version="", file="", disabled=True, loaded=True)
    plugin.problems.append(f"{DISABLE_VARIABLE} names it, but no such plug-in is installed: {nearest(name, known)}")
    return plugin


def _brings_torch(module: str, before: set[str]) -> bool:
    """Whether reading the manifest imported torch, also where torch had been imported by somebody else already."""
    new = set(sys.modules) - before
    if "torch" in new:
        return True
    root = module.partition(".")[0]
    mine = [sys.modules[name] for name in new if name == root or name.startswith(f"{root}.")]
    return any(_is_of_torch(value) for part in mine for value in list(vars(part).values()))


def _is_of_torch(value: object) -> bool:
    """Whether a module's global is something of torch, or a role, which cannot be had without torch."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and (home.partition(".")[0] == "torch" or f"{home}.".startswith("kfacore.roles."))


def _file_of(entry_point: metadata.EntryPoint) -> str:
    """The file of a module that could not be imported; the entry point's value if even that is unknown."""
    try:
        spec = util.find_spec(entry_point.module)
    except (Exception, SystemExit):  # looking for a submodule imports its parents
        return entry_point.value
    return spec.origin if spec is not None and spec.origin else entry_point.value


def _reason(error: BaseException) -> str:
    """The error in one line, with the line of code it came from."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    frames = [frame for frame in _frames(error) if not frame.filename.startswith("<frozen")]
    return f"{text} (line {frames[-1].lineno} of {frames[-1].filename})" if frames else text


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    """Frames of the error outside of the import machinery, oldest first."""
    machinery = (os.sep + "importlib" + os.sep, os.sep + "pluggy" + os.sep)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__ and not any(part in frame.filename for part in machinery):
            yield frame


def _hook_reason(error: Exception) -> str:
    """Pluggy's validation message without its layout."""
    return f"{' '.join(str(error).split())}; known hook: {_HOOK}()"
