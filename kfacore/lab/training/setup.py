"""From a configuration to the parts of a run: device, problem, model, data, likelihood, optimizer."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import kfacore
from kfacore.errors import ConfigError, DataError
from kfacore.lab.data import check
from kfacore.lab.training.averaging import IterateAverage
from kfacore.lab.training.batches import derive_seed
from kfacore.lab.training.init import load_parameters
from kfacore.lab.training.processes import device_of
from kfacore.optim.layout import find_layout
from kfacore.parallel.ranks import Ranks
from kfacore.roles import Likelihood, Optimizer, Problem, ProblemData, Split
from kfacore.schema.table import RUN_SLOTS, SLOTS

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.lab.training.checkpoint import Checkpoint
    from kfacore.registry import Registry

__all__ = [
    "Parts",
    "build_model",
    "build_optimizer",
    "build_parts",
    "build_together",
    "check_data",
    "load_states",
    "manifest",
    "method_of",
    "place",
    "resolve_device",
]


@dataclass
class Parts:
    """What a run consists of, built and checked.

    Attributes:
        problem: The problem.
        likelihood: The likelihood.
        model: The model, on the device and in the run's dtype.
        optimizer: The optimizer.
        average: The iterate average, or None if it is switched off.
        data: The data as loaded, on the CPU; its checksum and source.
        train: Training cases on the device.
        test: Test cases on the device, if there are any.
        device: Where everything lives.
        init: What the manifest records of ``--init``, or None.
    """

    problem: Problem
    likelihood: Likelihood
    model: nn.Module
    optimizer: Optimizer
    average: IterateAverage | None
    data: ProblemData
    train: Split
    test: Split | None
    device: torch.device
    init: dict[str, Any] | None

    @property
    def device_name(self) -> str:
        """The device in words, for people and the manifest."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)


def resolve_device(name: str) -> torch.device:
    """The device of a run.

    Args:
        name: ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, dtype=torch.float64, device=device).add_(1.0).cpu()  # damping needs double precision
    # What torch raises for a device that it cannot use depends on the device.
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device '{name}' cannot be used: {reason}; try auto or cpu") from error
    if device.type == "meta":
        raise ConfigError("device 'meta' cannot be used: it holds no numbers; try auto or cpu")
    return device


def method_of(config: RunConfig) -> str:
    """What tells runs apart in names and tables: the approximation, or the optimizer if it uses none."""
    return str(config.optimizer.kind if config.approx is None else config.approx.kind)


def build_model(config: RunConfig, problem: Problem) -> nn.Module:
    """The model with its initial parameters, which depend on the seed alone; on the CPU in float32."""
    return problem.build_model(torch.Generator().manual_seed(derive_seed(config.seed, "model")))


def build_parts(config: RunConfig, registry: Registry, init: Path | None = None) -> Parts:
    """Build everything that a run needs and check that it fits together.

    Args:
        config: The resolved configuration.
        registry: Where the components are.
        init: A file of parameters to start from.

    Raises:
        KfacError: Whatever is wrong with the configuration, the data or the parameters; nothing has been written.
    """
    device = resolve_device(device_of(config.device))
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    problem: Problem = registry.build("problem", config.problem)
    likelihood: Likelihood = registry.build("likelihood", config.likelihood)
    data = problem.load()
    model = build_model(config, problem)
    check_data(model, likelihood, data)
    recorded = load_parameters(model, init) if init is not None else None
    model = model.to(device=device, dtype=dtype)
    # The average copies the model, so it must come before an optimizer attaches anything to it.
    averaging = config.averaging
    average = IterateAverage(model, start=averaging.start, decay=averaging.decay) if averaging.decay > 0 else None
    return Parts(
        problem=problem,
        likelihood=likelihood,
        model=model,
        optimizer=build_optimizer(config, registry, model, likelihood),
        average=average,
        data=data,
        train=place(data.train, device, dtype),
        test=None if data.test is None else place(data.test, device, dtype),
        device=device,
        init=recorded,
    )


def build_together(config: RunConfig, registry: Registry, init: Path | None, ranks: Ranks) -> Parts:
    """`build_parts` on every process; the first builds its own before the others, so that data is fetched once.

    Args:
        config: The resolved configuration.
        registry: Where the components are.
        init: A file of parameters to start from.
        ranks: The processes of the run.

    Raises:
        KfacError: As `build_parts`, or the run cannot be divided among several processes.
    """
    parts: Parts | None = None
    for turn in range(min(2, ranks.size)):
        with ranks.together("build"):
            if turn == min(ranks.rank, 1):
                parts = build_parts(config, registry, init)
                _require_processes(config, parts, ranks)
    assert parts is not None
    return parts


def _require_processes(config: RunConfig, parts: Parts, ranks: Ranks) -> None:
    """Refuse what cannot run on several processes.

    Raises:
        ConfigError: The optimizer works alone, or a mini-batch is too small to be shared.
    """
    if config.processes not in (1, ranks.size):
        raise ConfigError(
            f"processes = {config.processes}, and this run has {ranks.size}: start it with torchrun --nproc-per-node "
            f"{config.processes} -m kfac_cli train ..."
        )
    if ranks.alone:
        return
    if not isinstance(getattr(parts.optimizer, "ranks", None), Ranks):
        raise ConfigError(
            f"optimizer '{config.optimizer.kind}' runs in one process: start it without torchrun, or use 'kfac'"
        )
    if min(config.batch.start, len(parts.train)) < ranks.size:
        raise ConfigError(
            f"batch.start = {config.batch.start} is less than one example for each of {ranks.size} processes; start "
            "fewer, or raise batch.start"
        )


def load_states(parts: Parts, checkpoint: Checkpoint, file: Path) -> None:
    """Parameters, the optimizer's state and the average as they were.

    Args:
        parts: Where they go.
        checkpoint: As read.
        file: Where from, for the message.

    Raises:
        DataError: They do not fit.
    """
    try:
        parts.model.load_state_dict(dict(checkpoint.model))
        parts.optimizer.load_state_dict(dict(checkpoint.optimizer))
        if parts.average is not None and checkpoint.averaged is not None:
            parts.average.load_state_dict(dict(checkpoint.averaged))
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, KeyError):
            reason = f"it has no entry {reason}"
        raise DataError(
            f"{file} does not fit the run's configuration: {reason}; start a new run, or use the versions in "
            "manifest.json"
        ) from error


def manifest(config: RunConfig, registry: Registry, parts: Parts, started: str, processes: int = 1) -> dict[str, Any]:
    """Everything besides the configuration that the run's numbers depend on; the data's source may be a path."""
    return {
        "format": 1,
        "started": started,
        "versions": {
            "kfacore": kfacore.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "plugins": [
            {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
            for plugin in registry.plugins()
            if _chosen(config) & set(plugin.components)
        ],
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:8],  # tells machines apart, and names none
        "device": parts.device_name,
        "threads": torch.get_num_threads(),
        **({"processes": processes} if processes > 1 else {}),
        "dtype": config.dtype,
        "seed": config.seed,
        "data": {
            "checksum": parts.data.checksum,
            "source": parts.data.source,
            "train_cases": len(parts.train),
            "test_cases": 0 if parts.test is None else len(parts.test),
            **parts.data.facts,
        },
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        "init": parts.init,
        "resumed": [],
    }


def _chosen(config: RunConfig) -> set[str]:
    """The components in the configuration, as ``"slot/name"``."""
    chosen = {slot: getattr(config, slot) for slot in RUN_SLOTS}
    parts = {slot: value if SLOTS[slot].many else (value,) for slot, value in chosen.items() if value is not None}
    return {f"{slot}/{part.kind}" for slot, values in parts.items() for part in values}


def check_data(model: nn.Module, likelihood: Likelihood, data: ProblemData) -> None:
    """Refuse data that the model and the likelihood cannot be trained on.

    Raises:
        DataError: The message says what does not fit.
        ConfigError: An option of the likelihood does not fit the model's outputs.
    """
    z = _first_outputs(model, data.train)
    y = data.train.targets[:1]
    layout, _ = find_layout(
        z, y, None, prefer_second=likelihood.class_second, where=f"training targets ({data.source})"
    )
    check(data, likelihood, layout.outputs, layout.target_rows if layout.positions or layout.scalar else None)
    y = layout.target_rows(y)
    likelihood.terms(y if y.is_floating_point() else y.long(), layout.outputs, torch.zeros(len(y), layout.outputs))


def build_optimizer(config: RunConfig, registry: Registry, model: nn.Module, likelihood: Likelihood) -> Optimizer:
    """What trains the model, with its parts.

    Raises:
        KfacError: The optimizer refuses the model or its parts cannot be built.
    """
    component = registry.find("optimizer", config.optimizer.kind)
    optimizer: type[Optimizer] = registry.load(component)
    return optimizer.for_run(
        config.optimizer,
        model=model,
        likelihood=likelihood,
        parts={slot: registry.build(slot, getattr(config, slot)) for slot in sorted(component.uses)},
        weight_decay=config.weight_decay,
        seed=derive_seed(config.seed, "optimizer"),
    )


def place(split: Split, device: torch.device, dtype: torch.dtype) -> Split:
    """Move cases to the device; floating point takes the run's dtype, labels stay integers."""

    def move(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=dtype if values.is_floating_point() else values.dtype)

    inputs = move(split.inputs)
    return Split(inputs, inputs if split.targets is split.inputs else move(split.targets))


@torch.no_grad()
def _first_outputs(model: nn.Module, split: Split) -> Tensor:  # (1, ..., o), (1, o, ...) or (1,)
    """What the model returns for one case. In evaluation mode: one case is no batch to normalise, and draws nothing."""
    shape = tuple(split.inputs.shape)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        z = model(split.inputs[:1])
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the model does not take inputs of shape {shape[1:]}: {reason}") from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(z, Tensor) or z.dim() < 1 or len(z) != 1:
        found = f"shape {tuple(z.shape)} for one example" if isinstance(z, Tensor) else type(z).__name__
        raise DataError(
            f"the model must return natural parameters of shape (examples, outputs), or (examples, positions, "
            f"outputs), found {found}"
        )
    return z


def _cpu() -> str:
    """The processor's name; where the system does not tell, what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
