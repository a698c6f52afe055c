"""Base config models, one a slot: the options that every implementation of the slot has.

Component defaults are the values of the authors' program (the preset ``paper``). An attribute's docstring is its help
text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ApproxConfig",
    "DampingConfig",
    "EstimatorConfig",
    "ExecutorConfig",
    "Fraction",
    "LayerConfig",
    "LikelihoodConfig",
    "Model",
    "MomentumConfig",
    "OptimizerConfig",
    "PiRule",
    "ProblemConfig",
    "SinkConfig",
    "SlotConfig",
    "Suggestions",
    "TrustConfig",
    "literals_of",
    "may_be_none",
]

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]

PiRule = Literal["layer", "net"] | None
"""How damping is split between the two factors of a layer, see `kfacore.curvature.linalg.pi_of`."""

NONE = "none"
"""How files and ``--set`` write None, for which TOML has no word."""


def literals_of(annotation: Any) -> list[Any]:
    """The values of a Literal, or of those in a union."""
    parts = (annotation, *get_args(annotation))
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


def may_be_none(annotation: Any) -> bool:
    """Whether a key of this type takes None, and "none" for it: unless the word is itself one of its values."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return may_be_none(arguments[0])
    return type(None) in arguments and NONE not in literals_of(annotation)


class Model(BaseModel):
    """Base of all config models: frozen, unknown keys refused, NaN and infinity refused, the word "none" for None."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _none_by_its_word(cls, values: Any) -> Any:
        """Read "none" as None where None is allowed."""
        if not isinstance(values, Mapping):
            return values
        words = {key for key, value in values.items() if isinstance(value, str) and value == NONE}
        optional = {key for key in words & cls.model_fields.keys() if may_be_none(cls.model_fields[key].annotation)}
        return {key: None if key in optional else value for key, value in values.items()} if optional else values


class SlotConfig(Model):
    """Options of one component. Subclasses declare ``kind: Literal["name"] = "name"``."""

    kind: str
    """Name of the implementation."""


class LikelihoodConfig(SlotConfig):
    """Options of a likelihood, and of the loss that is made of it."""

    per: Literal["example", "position", "batch"] | None = None
    """What the loss is divided by: the number of examples, of positions that count (a mean over tokens or pixels), or
    nothing, "batch"; by default what is usual for the likelihood. The same for outputs without positions."""
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Factor of the loss; its gradient, the Fisher and lambda follow."""


class EstimatorConfig(SlotConfig):
    """Options of a statistics estimator."""

    tau1: Fraction = 0.125
    """Share of the mini-batch, its first examples, used for the statistics (tau_1)."""
    min_cases: Annotated[int, Field(strict=True, ge=1)] = 1
    """At least this many examples for the statistics, even if tau1 is a smaller share. With R > 1 positions an example,
    as in text: 2 min_cases / R examples, at least 4."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Largest weight of the past in the running averages: f = min(1 - 1/k, decay)."""


class ApproxConfig(SlotConfig):
    """Options of an approximation of the Fisher."""

    refresh_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two refreshes of the approximate inverse (T_3); the first three steps always refresh."""
    refresh_growth: Annotated[float, Field(gt=0.0)] | None = None
    """Early refreshes: the next one comes when the step number has grown by this share, at the latest after
    refresh_every; none keeps to multiples of refresh_every."""
    refresh_share: Fraction | None = None
    """Largest share of the work, counted in operations, that refreshes after the first may be: one that is due waits
    until it fits; none refreshes whenever one is due."""
    refresh: Literal["inline", "background"] = "inline"
    """Compute a new inverse in its step, or on a worker while steps go on with the old one."""
    refresh_delay: Annotated[int, Field(ge=1)] = 10
    """Steps after which a refresh in the background is taken up (D), less than refresh_every."""

    memory: Literal["all", "owner"] = "all"
    """Where several processes keep statistics and inverses: "all", every process those of every block; "owner", each
    those of its own blocks, which then sends directions in every step. One process alone has all in either case."""

    max_dim: Annotated[int, Field(strict=True, ge=1)] = 8192
    """Widest side of which a whole factor is kept; of wider ones the diagonal is. In small nets it is lower: 1280, or
    the cube root of 50,000 times the number of parameters if that is more."""

    @model_validator(mode="after")
    def _delay_within_period(self) -> Self:
        if self.refresh == "background" and self.refresh_delay >= self.refresh_every:
            raise ValueError(
                f"refresh_delay {self.refresh_delay} must be less than refresh_every {self.refresh_every}: the next "
                "refresh would begin before this one is taken up"
            )
        return self


class DampingConfig(SlotConfig):
    """Options of a damping strategy."""

    pi: PiRule = "layer"
    """How gamma is split between A and G by their mean traces: "layer" with a pi of each layer (pi_i), "net" with the
    geometric mean of all of these for every layer; none adds gamma to both as it is."""
    units: Literal["parameters", "inputs"] = "parameters"
    """What lambda and gamma measure weights in: as they are, or, where inputs are below 0.03 or above 3 in size in the
    first step, in the power of ten near that, so that data in another unit trains alike."""


class MomentumConfig(SlotConfig):
    """Options of a momentum rule."""

    tau2: Fraction = 1.0
    """Share of the mini-batch, its first examples, used for the quadratic model (tau_2)."""
    min_cases: Annotated[int, Field(strict=True, ge=1)] = 1
    """At least this many examples for the quadratic model, even if tau2 is a smaller share. With R > 1 positions an
    example, as in text: 2 min_cases / R examples, at least 4."""
    slope: Literal["batch", "model"] = "batch"
    """Whose gradient the quadratic model has: the whole mini-batch's, or that of the examples of its curvature. With
    tau2 = 1 they are the same."""
    iterations: Annotated[int, Field(strict=True, ge=1)] = 1
    """Steps taken on the quadratic model before the parameters move, all with its one gradient; 1 is the paper's."""
    iterations_from: Annotated[int, Field(strict=True, ge=1)] = 1
    """Mini-batches with fewer examples than this take one such step, whatever iterations says."""


class LayerConfig(SlotConfig):
    """Options of a layer type. The network takes every registered one; nobody chooses it."""


class TrustConfig(SlotConfig):
    """Options of a rule of trust."""


class OptimizerConfig(SlotConfig):
    """Options of an optimizer."""


@dataclass(frozen=True)
class Suggestions:
    """What a problem suggests for the rest of a run's configuration.

    Attributes:
        values: Keys and values as in a file, for example a likelihood and the sizes of mini-batches.
        reason: One line for people where the likelihood was inferred from data; empty where the problem knows it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class ProblemConfig(SlotConfig):
    """Options of a problem."""

    run_defaults: ClassVar[dict[str, Any]] = {}
    """Configuration that this problem suggests, for example its likelihood and steps: below presets and files. Keys
    that are no slots, such as sizes of mini-batches, are above the preset "default"."""

    data_dir: str | None = None
    """Folder of the data files; also the environment variable KFAC_DATA."""

    def suggestions(self) -> Suggestions:
        """What this problem suggests with these options: `run_defaults`, unless it looks at its data.

        Called while a configuration is composed. Data that is missing or wrong is no matter here: `Problem.load` says
        so.

        Raises:
            KfacError: Nothing can be suggested, and the run could not start.
        """
        return Suggestions(self.run_defaults)

    def located(self) -> Self:
        """The same with names of files and folders that do not depend on the working folder, for a run's own record."""
        if self.data_dir is None:
            return self
        return self.model_copy(update={"data_dir": str(Path(self.data_dir).expanduser().absolute())})


class SinkConfig(SlotConfig):
    """Options of a metrics sink."""


class ExecutorConfig(SlotConfig):
    """Options of an executor, which starts the runs of a study."""

    workers: Annotated[int, Field(strict=True, ge=1)] = 1
    """Runs under way at the same time."""
