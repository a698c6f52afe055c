"""The registry proper: components by slot and name, config objects and parts from whatever a user may write."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from pydantic import ValidationError

from kfacore.errors import ConfigError, KfacError, PluginError, nearest
from kfacore.plugin import SLOTS, Component
from kfacore.registry.discovery import Plugin, PluginStatus, discover
from kfacore.schema.explain import explain
from kfacore.schema.slots import SlotConfig

if TYPE_CHECKING:
    from kfacore.roles import (
        Approximation,
        Damping,
        Estimator,
        Executor,
        Layer,
        Likelihood,
        Momentum,
        Part,
        Problem,
        Sink,
        Trust,
    )

__all__ = ["Registry", "get_registry", "reset_registry"]

_ALSO_CALLED: Mapping[str, Mapping[str, str]] = {
    "likelihood": {
        **dict.fromkeys(("ce", "cross_entropy", "crossentropy", "softmax", "nll"), "categorical"),
        **dict.fromkeys(("bce", "bce_with_logits", "binary", "sigmoid", "logistic"), "bernoulli"),
        **dict.fromkeys(("mse", "mse_loss", "l2", "squared", "normal"), "gaussian"),
    }
}
"""What people call components elsewhere, for the hint of an unknown name."""


class Registry:
    """All components of all plug-ins.

    Args:
        plugins: What `kfacore.registry.discovery.discover` found.
    """

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self._plugins = tuple(plugins)
        self._components: dict[str, dict[str, Component]] = {slot: {} for slot in SLOTS}
        self._owners: dict[tuple[str, str], Plugin] = {}
        for plugin in self._plugins:
            for component in plugin.components:
                self._components[component.slot][component.name] = component
                self._owners[component.slot, component.name] = plugin

    def plugins(self) -> tuple[PluginStatus, ...]:
        """The state of every plug-in, kfacore's own first."""
        return tuple(plugin.status() for plugin in self._plugins)

    def components(self, slot: str) -> tuple[Component, ...]:
        """The components of a slot, in the order of their plug-ins.

        Raises:
            ConfigError: There is no such slot.
        """
        return tuple(self._slot(slot).values())

    def find(self, slot: str, name: str) -> Component:
        """The component of a name.

        Args:
            slot: One of `kfacore.plugin.SLOTS`.
            name: What the user wrote.

        Raises:
            ConfigError: There is no such slot or name; the message has the nearest right one.
            PluginError: The name belongs, or may belong, to a plug-in that cannot be used; it is named with the reason.
        """
        known = self._slot(slot)
        if name in known:
            return known[name]
        refusals = [
            f"{plugin.status()}: {plugin.refused[slot, name]}"
            for plugin in self._plugins
            if (slot, name) in plugin.refused
        ]
        if refusals:
            raise PluginError(f"{slot} '{name}' cannot be used: {'; '.join(refusals)}")
        message = f"unknown {slot} '{name}'"
        hint = nearest(_ALSO_CALLED.get(slot, {}).get(name.lower().replace("-", "_"), name), known)
        if hint:
            message += f", {hint}"
        unread = [plugin.status() for plugin in self._plugins if not plugin.loaded]
        if not unread:
            raise ConfigError(message if hint else f"{message}: no installed plug-in offers any {slot}")
        suspects = "; ".join(f"{status}: {status.reason}" for status in unread)
        raise (ConfigError if hint.startswith("did") else PluginError)(
            f"{message}\nIt may come from a plug-in that could not be read: {suspects}"
        )

    def origin(self, component: Component) -> PluginStatus:
        """The plug-in that offers a component.

        Raises:
            ConfigError: The component is not of this registry.
        """
        owner = self._owners.get((component.slot, component.name))
        if owner is None:
            raise ConfigError(f"{component.slot}/{component.name} is not a registered component")
        return owner.status()

    def load(self, component: Component) -> type[Any]:
        """Import a component's class and check that it plays the slot's role. Imports torch.

        Args:
            component: A registered manifest.

        Returns:
            The class, a concrete subclass of the slot's role in `kfacore.roles`.

        Raises:
            PluginError: The target cannot be imported or is not what it should be; the plug-in is named.
        """
        where = f"{component.slot}/{component.name} of {self.origin(component)}"
        module_name, _, attribute = component.target.partition(":")
        try:
            found: Any = import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except KfacError as error:  # a target that knows what it lacks says it best
            raise type(error)(f"{where}: {error}") from error
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if f"{module_name}.".startswith(f"{missing}."):
                raise PluginError(f"{where}: there is no module '{missing}' (target '{component.target}')") from error
            raise PluginError(f"{where} needs the package '{missing}', which is not installed") from error
        except (Exception, SystemExit) as error:
            raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        reason = _misfit(found, component)
        if reason:
            raise PluginError(f"{where}: {component.target} {reason}")
        return cast("type[Any]", found)

    def config(self, slot: str, value: object) -> SlotConfig:
        """The config object of a slot from what a user may write.

        Args:
            slot: One of `kfacore.plugin.SLOTS`.
            value: A name, a table with ``kind``, or a config object of a registered component.

        Raises:
            ConfigError: A name, key or value is wrong.
            PluginError: The name belongs to a plug-in that cannot be used.
        """
        known = self._slot(slot)
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping):
            kind = value.get("kind")
            if not isinstance(kind, str):
                found = f"kind = {kind!r}" if "kind" in value else "no kind"
                raise ConfigError(f"a table for {slot} needs kind = a name, found {found}, known: {', '.join(known)}")
            model = self.find(slot, kind).config
            try:
                return model.model_validate(dict(value))
            except ValidationError as error:
                raise ConfigError(explain(error, model, prefix=(slot,))) from error
        if isinstance(value, SlotConfig):
            base = SLOTS[slot].config
            if not isinstance(value, base):
                raise ConfigError(f"{slot} takes a {base.__name__}, found a {type(value).__name__}")
            if self.find(slot, value.kind).config is not type(value):
                raise ConfigError(
                    f"{type(value).__name__} is not the config model that the registered {slot} '{value.kind}' has"
                )
            return value
        raise ConfigError(
            f"{slot} takes a name, a table with kind, or a config object, found a {type(value).__name__}: {value!r:.60}"
        )

    @overload
    def build(self, slot: Literal["problem"], value: object) -> Problem: ...
    @overload
    def build(self, slot: Literal["likelihood"], value: object) -> Likelihood: ...
    @overload
    def build(self, slot: Literal["estimator"], value: object) -> Estimator: ...
    @overload
    def build(self, slot: Literal["approx"], value: object) -> Approximation: ...
    @overload
    def build(self, slot: Literal["damping"], value: object) -> Damping: ...
    @overload
    def build(self, slot: Literal["momentum"], value: object) -> Momentum: ...
    @overload
    def build(self, slot: Literal["trust"], value: object) -> Trust: ...
    @overload
    def build(self, slot: Literal["layer"], value: object) -> Layer: ...
    @overload
    def build(self, slot: Literal["sink"], value: object) -> Sink: ...
    @overload
    def build(self, slot: Literal["executor"], value: object) -> Executor: ...
    @overload
    def build(self, slot: str, value: object) -> Part: ...
    def build(self, slot: str, value: object) -> Part:
        """A ready part from what a user may write. Imports torch.

        Args:
            slot: One of `kfacore.plugin.SLOTS` but ``"optimizer"``, whose parts need a model: see
                `kfacore.roles.Optimizer.for_run`.
            value: A name, a table with ``kind``, a config object, or an instance of the role, returned as it is.

        Raises:
            ConfigError: A name, key, value or type is wrong.
            PluginError: The component's plug-in cannot be used, or fails to build it.
        """
        self._slot(slot)
        if slot == "optimizer":
            raise ConfigError("an optimizer is built with its class's for_run, because it needs a model")
        role = _role(slot)
        if isinstance(value, role):
            return cast("Part", value)
        if not isinstance(value, str | Mapping | SlotConfig):
            found = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise ConfigError(
                f"{slot} takes a name, a table with kind, a config object or an instance of {role.__name__}, "
                f"found {found}"
            )
        config = self.config(slot, value)
        component = self.find(slot, config.kind)
        target = self.load(component)
        try:
            return cast("Part", target(config))
        except (KfacError, OSError, MemoryError):
            raise
        except Exception as error:
            raise PluginError(
                f"{slot}/{component.name} of {self.origin(component)} cannot be built: {type(error).__name__}: {error}"
            ) from error

    def layers(self) -> list[Layer]:
        """A part of every layer type, built from its defaults.

        Those of other distributions come first, so that a plug-in can read a module in another way than kfacore does.

        Raises:
            PluginError: A layer type cannot be loaded or built; its plug-in is named.
        """
        own = self._plugins[0] if self._plugins else None
        components = sorted(self.components("layer"), key=lambda item: self._owners["layer", item.name] is own)
        return [self.build("layer", component.name) for component in components]

    def _slot(self, slot: str) -> dict[str, Component]:
        if slot not in self._components:
            raise ConfigError(f"unknown slot '{slot}', {nearest(slot, self._components)}")
        return self._components[slot]


def _role(slot: str) -> type[Any]:
    """The abstract class of a slot; most need torch, and are therefore imported only when a target is loaded."""
    return cast("type[Any]", getattr(import_module("kfacore.roles"), SLOTS[slot].role))


def _misfit(found: object, component: Component) -> str | None:
    """Why an imported target cannot play the role, or None."""
    role = _role(component.slot)
    if not isinstance(found, type) or not issubclass(found, role):
        return f"is not a subclass of kfacore.roles.{role.__name__}"
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        return f"does not implement {missing}"
    if component.slot == "optimizer":
        return None
    declared = getattr(found, "Config", None)
    if not isinstance(declared, type) or not issubclass(component.config, declared):
        return f"must set Config = {component.config.__name__}, the config model of its manifest"
    return None


@cache
def get_registry() -> Registry:
    """The registry of everything installed, made on the first call."""
    return Registry(discover())


def reset_registry() -> None:
    """Forget the registry, so that the next `get_registry` looks again (for tests and after an installation)."""
    get_registry.cache_clear()
