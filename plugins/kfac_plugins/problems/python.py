"""The problem that a user's own function returns."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from kfac_plugins.problems.python_config import PythonConfig
from kfac_plugins.problems.user_answer import Answer, read_answer
from kfac_plugins.problems.user_function import call, find_function, seeded
from kfacore.errors import ConfigError
from kfacore.plugin import Suggestions
from kfacore.roles import Problem, ProblemData

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Python", "suggestions_of"]

_DATA_SEED = 0
"""Seed of everything that the function draws for its data, so that all runs have the same."""


def _call(config: PythonConfig, seed: int) -> Any:
    """What the function returns with the global generators at a seed."""
    function = find_function(config.target, config.folder)
    with seeded(seed):
        return call(function, config.arguments, config.target, config.folder)


@lru_cache(maxsize=1)
def _answer(described: str) -> Answer:
    """The function's answer; kept, because a configuration is composed before a problem is built of it."""
    config = PythonConfig.model_validate_json(described)
    return read_answer(_call(config, _DATA_SEED), config.target)


def answer_of(config: PythonConfig) -> Answer:
    """What the function returns, read.

    Raises:
        KfacError: It cannot be called, or returns something else.
    """
    if not config.target:
        raise ConfigError(
            "the problem 'python' needs a function that returns it: kfac train module:function, or --set "
            "problem.target=module:function"
        )
    return _answer(json.dumps(config.located().model_dump(mode="json"), sort_keys=True))


def suggestions_of(config: PythonConfig) -> Suggestions:
    """The likelihood that the function returns or that its targets suggest.

    Raises:
        KfacError: As `answer_of`.
    """
    answer = answer_of(config)
    return Suggestions({"likelihood": dict(answer.likelihood)}, answer.reason)


class Python(Problem):
    """Model and data of a function of the user's.

    The function is called once for its data, with the global generators of torch, numpy and Python at a fixed seed,
    and once for its model, with torch's at the run's seed. A function that returns a function for the model is called
    once, and the model's function at the run's seed.
    """

    Config: ClassVar[type[PythonConfig]] = PythonConfig
    config: PythonConfig

    @property
    def task(self) -> Literal["autoencoder", "classifier", "regression"]:  # type: ignore[override]  # read-only here
        """What is learned."""
        return answer_of(self.config).task

    @property
    def image_shape(self) -> tuple[int, int] | None:  # type: ignore[override]  # read-only here
        """(height, width) of a case, if the function says so."""
        return answer_of(self.config).image_shape

    def load(self) -> ProblemData:
        """What the function returned."""
        return answer_of(self.config).data

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """The function's model, initialised at the generator's seed; in float32 on the CPU.

        Raises:
            KfacError: The function fails, or returns something else than before.
        """
        config, answer = self.config, answer_of(self.config)
        if answer.problem is not None:
            return answer.problem.build_model(generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        model: Any = answer.model
        if isinstance(model, nn.Module):
            model = read_answer(_call(config, seed), config.target).model
        else:
            with seeded(seed):
                model = call(model, {}, f"{config.target} (the model's function)", config.folder)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{config.target}: the model is a {type(model).__name__}; needed is an nn.Module, or a function that "
                "makes one"
            )
        return model.to(device="cpu", dtype=torch.float32)

    def picture(self, values: Tensor) -> Tensor:
        """As the user's problem says, if it is one."""
        problem = answer_of(self.config).problem
        return values if problem is None else problem.picture(values)
