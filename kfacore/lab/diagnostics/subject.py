"""What is inspected: a model at its initialisation, or as a checkpoint has it, on some training cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kfacore.errors import ConfigError, DataError
from kfacore.host import seed_generators
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.training.batches import derive_seed
from kfacore.lab.training.checkpoint import Checkpoint, load_checkpoint
from kfacore.lab.training.run import RunFolder
from kfacore.lab.training.setup import build_model
from kfacore.optim.guest_state import own_state
from kfacore.optim.units import sizes_of, units_of
from kfacore.roles import Problem
from kfacore.roles.samples import mean_diagonal
from kfacore.schema.slots import PiRule
from kfacore.schema.table import SLOT_DEFAULTS

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["Subject", "subject_at_start", "subject_of_run", "training_cases"]


@dataclass(frozen=True)
class Subject:
    """A model to inspect.

    Attributes:
        name: What it is, in words.
        problem: Name of the problem.
        step: Steps that trained it; 0 at initialisation.
        exact: The exact quadratic model on the chosen cases.
        gamma: gamma of the approximations.
        pi: How gamma is split, see `kfacore.curvature.linalg.pi_of`.
        seed: Seed of the choice of cases and of every draw.
        measured: Blocks whose weights training measures in the unit of their inputs (`kfacore.optim.units`).
    """

    name: str
    problem: str
    step: int
    exact: ExactModel
    gamma: float
    pi: PiRule
    seed: int
    measured: tuple[str, ...] = ()

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, f"inspect {purpose}"))


def subject_at_start(
    config: RunConfig, registry: Registry, *, cases: int, lam: float | None = None, gamma: float | None = None
) -> Subject:
    """The model at its initialisation, with the first lambda and gamma of the configured damping.

    Args:
        config: The configuration; its seed initialises the model and chooses the cases.
        registry: Where the components are.
        cases: How many training cases.
        lam: lambda instead of the damping's.
        gamma: gamma instead of the damping's.

    Raises:
        KfacError: Whatever is wrong with the configuration, the data or the model.
    """
    problem = registry.build("problem", config.problem)
    model = build_model(config, problem)
    name = f"{config.problem.kind} at initialisation"
    return _subject(config, registry, problem, model, None, name, cases, lam, gamma)


def subject_of_run(
    run: Path,
    config: RunConfig,
    registry: Registry,
    *,
    cases: int,
    lam: float | None = None,
    gamma: float | None = None,
) -> Subject:
    """The model of a run's checkpoint, with lambda and gamma as they were there.

    Args:
        run: The run folder.
        config: Its configuration, `kfacore.lab.training.resume_config`.
        registry: Where the components are.
        cases: How many training cases.
        lam: lambda instead of the run's.
        gamma: gamma instead of the run's.

    Raises:
        KfacError: The folder holds no run, the checkpoint is damaged, or the data is not there.
    """
    checkpoint = load_checkpoint(RunFolder(run).checkpoint_file)
    problem = registry.build("problem", config.problem)
    model = build_model(config, problem)
    try:
        model.load_state_dict(dict(checkpoint.model))
    except RuntimeError as error:
        raise DataError(
            f"{RunFolder(run).checkpoint_file}: its parameters do not fit the model of the problem "
            f"'{config.problem.kind}' ({str(error).splitlines()[-1].strip()}); was the problem changed since?"
        ) from error
    name = f"{run.resolve().name} at step {checkpoint.step}"
    return _subject(config, registry, problem, model, checkpoint, name, cases, lam, gamma)


def training_cases(inputs: Tensor, targets: Tensor, cases: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random choice of training cases without repetition; all of them if there are no more."""
    if cases >= len(inputs):
        return inputs, targets
    generator = torch.Generator().manual_seed(derive_seed(seed, "inspect cases"))
    chosen = torch.randperm(len(inputs), generator=generator)[:cases]
    picked = inputs.index_select(0, chosen)
    return picked, picked if targets is inputs else targets.index_select(0, chosen)


def _subject(
    config: RunConfig,
    registry: Registry,
    problem: Problem,
    model: nn.Module,
    checkpoint: Checkpoint | None,
    name: str,
    cases: int,
    lam: float | None,
    gamma: float | None,
) -> Subject:
    data = problem.load()
    likelihood = registry.build("likelihood", config.likelihood)
    inputs, targets = training_cases(data.train.inputs, data.train.targets, cases, config.seed)
    max_dim = 8192 if config.approx is None else config.approx.max_dim
    with torch.random.fork_rng():  # one draw of what the model draws, the same in every inspection
        seed_generators(derive_seed(config.seed, "inspect draws"))
        exact = ExactModel(model, likelihood, inputs, targets, weight_decay=config.weight_decay, max_dim=max_dim)
    found_lam, found_gamma, measured = _damping(config, registry, checkpoint, exact)
    gamma = found_gamma if gamma is None else gamma
    if not gamma > 0:
        raise ConfigError(f"gamma is {gamma:g}; inspecting needs one > 0 to start from, give --gamma")
    return Subject(
        name=name,
        problem=str(config.problem.kind),
        step=0 if checkpoint is None else checkpoint.step,
        exact=exact.damped(found_lam if lam is None else lam),
        gamma=gamma,
        pi=config.damping.pi if config.damping is not None else "layer",
        seed=config.seed,
        measured=measured,
    )


def _damping(
    config: RunConfig, registry: Registry, checkpoint: Checkpoint | None, exact: ExactModel
) -> tuple[float, float, tuple[str, ...]]:
    """Lambda and gamma of the checkpoint, or the first ones of the configured damping; and the blocks `measured`."""
    # Optimizers without curvature have no damping of their own: the default one's first values serve.
    damping = registry.build("damping", config.damping or SLOT_DEFAULTS["damping"])
    damping.start(config.weight_decay, torch.device("cpu"))
    saved = None if checkpoint is None else own_state(checkpoint.optimizer)
    if saved is not None:
        damping.load_state_dict(saved["damping"])
        units = saved.get("units") or [1.0] * len(exact.layers)
    else:
        estimator = registry.build("estimator", config.estimator or SLOT_DEFAULTS["estimator"])
        samples = exact.samples(estimator, torch.Generator().manual_seed(config.seed))
        damping.observe(mean_diagonal(samples, exact.layers))
        own = damping.config.units == "inputs"
        units = units_of(sizes_of([samples], exact.layers, torch.device("cpu"))) if own else [1.0] * len(exact.layers)
    names = tuple(block.name for block, u in zip(exact.layers, units, strict=False) if u != 1.0)
    return float(damping.lam), float(damping.gamma), names
