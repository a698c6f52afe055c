"""The configuration of a run, composed at run time from the registered components."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model, field_validator

from kfacore.schema.slots import (
    ApproxConfig,
    DampingConfig,
    EstimatorConfig,
    LikelihoodConfig,
    Model,
    MomentumConfig,
    OptimizerConfig,
    ProblemConfig,
    SinkConfig,
    TrustConfig,
)
from kfacore.schema.table import PART_SLOTS, RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = [
    "SECTIONS",
    "AveragingConfig",
    "BatchConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "EvalConfig",
    "RunConfig",
    "run_config_model",
]

# Strict, because `steps = true` or `steps = "500"` in a file is a slip and not a number.
Count = Annotated[int, Field(strict=True, ge=1)]
Interval = Annotated[int, Field(strict=True, ge=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0.0)]

_DEVICE = re.compile(r"auto|[a-z]+(:\d+)?")


class BatchConfig(Model):
    """Sizes of the mini-batches."""

    schedule: Literal["exponential", "constant"] = "exponential"
    """How the size grows: exponential reaches the whole training set at target_step, constant stays at start."""
    start: Count = 1000
    """Examples in the first mini-batch (m_1)."""
    target_step: Annotated[int, Field(strict=True, ge=2)] = 500
    """Step at which the exponential schedule reaches the whole training set (K)."""
    hold: Count = 1
    """Steps that share one size before it grows; ten let bfloat16 pay on a CPU: each new size costs new kernels."""
    sampling: Literal["independent", "epochs"] = "independent"
    """Draw each mini-batch from the whole training set, or all of them in turn from passes over it in random order."""


class AveragingConfig(Model):
    """Averaging of the iterates, for reporting."""

    start: Count = 200
    """First step of the average."""
    decay: Annotated[float, Field(strict=True, ge=0.0, lt=1.0)] = 0.99
    """Largest weight of the past: f = min(1 - 1/(k - start + 1), decay); 0 switches averaging off."""


class BudgetConfig(Model):
    """Limits besides `steps`; the run ends with the step that reaches the first of them."""

    cases: Count | None = None
    """Training examples in all, the sum of the mini-batches; no limit if left out."""
    seconds: Annotated[float, Field(strict=True, gt=0.0)] | None = None
    """Training seconds in all, evaluation and checkpoints not counted; no limit if left out."""


class EvalConfig(Model):
    """Evaluation on the whole training and test sets."""

    every: Interval = 50
    """Steps between two evaluations; 0 evaluates at the end only."""
    early: bool = True
    """Evaluate after steps 1, 2, 5, 10, 20, 50, ... below `every` as well, where the error falls fastest."""
    cases: Count | None = None
    """Training and test examples of an evaluation, evenly spread over each set; all of them if left out."""


class CheckpointConfig(Model):
    """Checkpoints."""

    every: Interval = 50
    """Steps between two checkpoints; 0 writes one at the end only."""


class RunConfig(Model):
    """Everything a run depends on, made by `kfacore.lab.config.resolve`; component fields hold config objects.

    The class that `run_config_model` returns has the same fields, each slot narrowed to the registered components.
    """

    preset: str = "default"
    """Named set of values below files and flags; `kfac schema` lists the names."""
    problem: ProblemConfig
    """Model, data, likelihood and initialisation."""
    likelihood: LikelihoodConfig
    """Predictive distribution; the problem suggests one."""
    optimizer: OptimizerConfig
    """What trains the model."""
    estimator: EstimatorConfig | None = None
    """How the Fisher's statistics are estimated."""
    approx: ApproxConfig | None = None
    """Approximation of the Fisher."""
    damping: DampingConfig | None = None
    """How lambda and gamma are chosen."""
    momentum: MomentumConfig | None = None
    """How the learning rate and the momentum coefficient of a step are chosen."""
    trust: TrustConfig | None = None
    """Whether steps that raise the objective are undone."""
    sink: tuple[SinkConfig, ...] = ()
    """Where the events of the run go."""
    steps: Count = 500
    """Steps in all, also when a run is resumed."""
    budget: BudgetConfig = BudgetConfig()
    """Limits in examples and seconds, besides steps."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of every random draw."""
    device: str = "auto"
    """Device of the computation: auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "float64"] = "float32"
    """Number format of parameters and data."""
    processes: Count = 1
    """Processes that the run is divided among, started by torchrun; 1 says nothing of them."""
    threads: Count | None = None
    """Threads of the CPU computation; as many as torch chooses if left out."""
    weight_decay: NonNegative = 0.0
    """Strength of the L2 term of the objective (eta), biases included."""
    batch: BatchConfig = BatchConfig()
    """Sizes of the mini-batches."""
    averaging: AveragingConfig = AveragingConfig()
    """Averaging of the iterates, for reporting."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on the whole data sets."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    pictures: bool = True
    """Draw pictures at the end, which takes seconds; a study of many small runs may do without."""

    @field_validator("device")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("not the name of a device; write auto, cpu, cuda or cuda:0")
        return value

    def as_dict(self) -> dict[str, Any]:
        """The complete configuration in JSON types; `kfacore.lab.config.resolve.read_saved` reads it back."""
        return self.model_dump(mode="json", serialize_as_any=True)


SECTIONS: dict[str, type[Model]] = {
    "budget": BudgetConfig,
    "batch": BatchConfig,
    "averaging": AveragingConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
}
"""Keys of `RunConfig` that are tables but no slots."""


@lru_cache(maxsize=4)
def run_config_model(registry: Registry) -> type[RunConfig]:
    """The model of a run's configuration: in each slot, a union of the registered components discriminated by ``kind``.

    Args:
        registry: Where the components come from.
    """
    fields: dict[str, Any] = {}
    for slot in RUN_SLOTS:
        choice = _choice(registry, slot)
        description = RunConfig.model_fields[slot].description
        if SLOTS[slot].many:
            fields[slot] = (tuple[choice, ...], Field(default=(), description=description))  # type: ignore[valid-type]  # made at run time
        elif slot in PART_SLOTS:
            fields[slot] = (Union[choice, None], Field(default=None, description=description))  # noqa: UP007  # ditto
        else:
            fields[slot] = (choice, Field(description=description))
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, **fields)


def _choice(registry: Registry, slot: str) -> Any:
    """The type of a slot: its components' config models; the bare base model if there is none."""
    models = tuple(component.config for component in registry.components(slot))
    if len(models) < 2:
        return models[0] if models else SLOTS[slot].config
    return Annotated[Union[models], Field(discriminator="kind")]  # noqa: UP007  # the members are known at run time only
