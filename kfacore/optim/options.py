"""The options of `kfacore.KFAC`, and where those come from that are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from kfacore.errors import ConfigError, nearest
from kfacore.registry import Registry
from kfacore.registry.compose import compose_slots, preset_layer
from kfacore.schema.presets import DEFAULT_PRESET
from kfacore.schema.slots import (
    ApproxConfig,
    DampingConfig,
    EstimatorConfig,
    LikelihoodConfig,
    Model,
    MomentumConfig,
    TrustConfig,
    literals_of,
    may_be_none,
)
from kfacore.schema.table import PART_SLOTS

__all__ = ["KFACConfig", "complete"]


class KFACConfig(Model):
    """All options of `KFAC` in one object; a slot is a name, a table with ``kind``, or a config object."""

    likelihood: str | dict[str, Any] | LikelihoodConfig
    """The predictive distribution."""
    approx: str | dict[str, Any] | ApproxConfig | None = None
    """The approximation of the Fisher; ``"blockdiag"`` if neither this nor the preset names one."""
    estimator: str | dict[str, Any] | EstimatorConfig | None = None
    """The statistics estimator; the preset's if left out."""
    damping: str | dict[str, Any] | DampingConfig | None = None
    """The damping strategy; the preset's if left out."""
    momentum: str | dict[str, Any] | MomentumConfig | None = None
    """The momentum rule; the preset's if left out."""
    trust: str | dict[str, Any] | TrustConfig | None = None
    """Whether steps that raise the objective are undone; the preset's if left out."""
    weight_decay: float | None = None
    """eta of the objective h = loss + eta/2 ||theta||^2, biases included; the preset's if left out, or none."""
    lr: float = 1.0
    """What steps are multiplied by, for schedulers; with 1 a step goes to the minimum of the quadratic model."""
    preset: str = DEFAULT_PRESET
    """Where slots that are left out come from: "default", "paper" or "heskes"."""
    seed: int = 0
    """Seed of the sampled targets."""
    autocast: Literal["bfloat16"] | None = None
    """Mixed precision: dtype of the forward and backward passes; factors, solves and the quadratic model keep the
    parameters' dtype."""
    unsupported: Literal["serve", "error"] = "serve"
    """Models beyond Linear layers that are called once on one row an example: serve them, or refuse them by name."""
    output: str | None = None
    """Where z is in what the model returns; ``"logits"`` and the first tensor are found. `KFAC` itself takes a function
    too."""
    reduce: tuple[str, ...] = ()
    """Names of blocks whose positions are pooled: their rows are summed over an example's positions first."""
    fill_grad: bool = False
    """Whether a step leaves the gradient of the loss in ``p.grad``, for whoever logs it."""


def complete(registry: Registry, config: KFACConfig | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option with its value: given, or the config's, or the preset's.

    A slot given by name or as a table gets what it leaves out from the preset, by the composer that `kfac train`
    has too; config objects and instances are taken as they are.

    Raises:
        ConfigError: Both a config and single options are given, the likelihood is missing, or a name is unknown.
    """
    if config is not None:
        if given:
            raise ConfigError(f"give config or single options, not both; found config and {', '.join(given)}")
        given = {key: getattr(config, key) for key in type(config).model_fields}
    defaults = {key: field.default for key, field in KFACConfig.model_fields.items() if key != "likelihood"}
    chosen = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    if "likelihood" not in chosen:
        raise ConfigError("KFAC needs likelihood = 'bernoulli', 'categorical' or 'gaussian': what the outputs mean")
    preset = preset_layer(chosen["preset"])
    if chosen["weight_decay"] is None:
        chosen["weight_decay"] = preset.values.get("weight_decay", 0.0)
    chosen.update(compose_slots(registry, PART_SLOTS, preset, chosen))
    _check_choices(chosen)
    _check_numbers(chosen)
    return chosen


def _check_numbers(chosen: Mapping[str, Any]) -> None:
    """Weight decay, learning rate, seed.

    Raises:
        ConfigError: One is no such number.
    """
    for key in ("weight_decay", "lr"):
        value = chosen[key]
        if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            hint = "" if key == "weight_decay" else "; 1, the default, is the step that the model says"
            raise ConfigError(f"{key} must be a number >= 0, found {value!r}{hint}")
    if not isinstance(chosen["seed"], int) or isinstance(chosen["seed"], bool):
        raise ConfigError(f"seed must be an integer, found {chosen['seed']!r}")


def _check_choices(chosen: Mapping[str, Any]) -> None:
    """What is one of a few words, and the two options that name parts of the model.

    Raises:
        ConfigError: The message has the nearest right word.
    """
    for key in ("autocast", "unsupported"):
        annotation, value = KFACConfig.model_fields[key].annotation, chosen[key]
        words = literals_of(annotation)
        if value in words or (value is None and may_be_none(annotation)):
            continue
        allowed = " or ".join([*map(repr, words), *(["left out"] if may_be_none(annotation) else [])])
        hint = f"; {nearest(value, words)}" if isinstance(value, str) and len(words) > 1 else ""
        raise ConfigError(f"{key} must be {allowed}, found {value!r}{hint}")
    output, reduce = chosen["output"], chosen["reduce"]
    if not (output is None or isinstance(output, str) or callable(output)):
        raise ConfigError(f"output must be a name or a function of what the model returns, found {output!r}")
    if isinstance(reduce, str) or not all(isinstance(name, str) for name in reduce):
        raise ConfigError(f"reduce must be a list of names of blocks, found {reduce!r}; for one block write ['name']")
