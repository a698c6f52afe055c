"""The options of `kfacore.Preconditioned`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kfacore.errors import ConfigError, nearest
from kfacore.network.outputs import Output
from kfacore.registry import Registry
from kfacore.registry.compose import Layer, compose_slots
from kfacore.schema.slots import PiRule

__all__ = ["GuestOptions"]

_POWER = 0.5
"""Exponent of the factors where the approximation has one: noisy small mini-batches want tempered, well damped ones."""


@dataclass(frozen=True)
class GuestOptions:
    """What was chosen; see `Preconditioned`."""

    every: int
    scale: Literal["graft", "kl", "none"]
    rest: Literal["base", "diagonal"]
    damping: float
    gamma: float | None
    pi: PiRule
    kappa: float
    decoupled: bool | None
    output: Output
    reduce: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, *, model: Any, base: Any, **options: Any) -> GuestOptions:
        """Check them.

        Raises:
            ConfigError: One is wrong; the message says what it may be.
        """
        chosen = cls(**options)
        if not isinstance(model, nn.Module):
            first = "; the model comes first: Preconditioned(model, base)" if isinstance(base, nn.Module) else ""
            raise ConfigError(f"model: a torch.nn.Module is needed, found a {type(model).__name__}{first}")
        _check_base(model, base)
        for name, known in (("scale", ("graft", "kl", "none")), ("rest", ("base", "diagonal"))):
            value = getattr(chosen, name)
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}: {nearest(str(value), known)}")
        if not isinstance(chosen.every, int) or isinstance(chosen.every, bool) or chosen.every < 1:
            raise ConfigError(f"every must be a whole number of steps, at least 1, found {chosen.every!r}")
        for name in ("damping", "gamma", "kappa"):
            value = getattr(chosen, name)
            if value is None and name == "gamma":
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, found {value!r}")
        if chosen.pi not in ("layer", "net", None):
            raise ConfigError(f"unknown pi {chosen.pi!r}: known: 'layer', 'net', None")
        return chosen

    @property
    def chosen(self) -> dict[str, Any]:
        """By name."""
        return dict(vars(self))

    def parts(self, registry: Registry, approx: Any, estimator: Any) -> dict[str, Any]:
        """The approximation, tempered and refreshed with the statistics, and the estimator, on all of the batch.

        Unless they say otherwise: these are a guest's preset.
        """
        own: dict[str, Any] = {"refresh_every": self.every, "power": _POWER}
        if isinstance(approx, Mapping) and approx.get("refresh") == "background":
            own["refresh_delay"] = max(1, int(approx.get("refresh_every", self.every)) // 2)
        preset = Layer("preset of guests", user=False, values={"approx": own, "estimator": {"tau1": 1.0}})
        return compose_slots(registry, ("approx", "estimator"), preset, {"approx": approx, "estimator": estimator})


def _check_base(model: nn.Module, base: Any) -> None:
    """An optimizer that can be asked for a step, with parameters of this model.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(base, torch.optim.Optimizer):
        raise ConfigError(
            f"base: a torch optimizer is needed, found a {type(base).__name__}; for example "
            "torch.optim.AdamW(model.parameters(), lr=3e-4)"
        )
    name = type(base).__name__
    if isinstance(base, torch.optim.LBFGS):
        raise ConfigError(f"base: {name} evaluates the loss several times a step, which no other optimizer can wrap")
    if isinstance(base, torch.optim.SparseAdam):
        raise ConfigError(f"base: {name} takes sparse gradients only, which cannot be preconditioned")
    if hasattr(base, "linearizer"):
        raise ConfigError(f"base: {name} preconditions already; give it a plain optimizer, or use {name} itself")
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in base.param_groups for p in group["params"]):
        raise ConfigError(
            f"base: {name} has no parameter of this model; build it with the parameters of the model that is trained"
        )
