"""The problem that a user's own function returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from kfac_plugins.problems.python_answer import call_at
from kfac_plugins.problems.python_config import PythonConfig
from kfac_plugins.problems.user_answer import Answer, read_answer
from kfac_plugins.problems.user_function import call, seeded
from kfacore.errors import ConfigError
from kfacore.roles import Problem, ProblemData

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Python"]


class Python(Problem):
    """Model and data of a function of the user's.

    The function is called once for its data, with the global generators of torch, numpy and Python at a fixed seed,
    and once for its model, with torch's at the run's seed. A function that returns a function for the model is called
    once, and the model's function at the run's seed.
    """

    Config: ClassVar[type[PythonConfig]] = PythonConfig
    config: PythonConfig

    @property
    def _answer(self) -> Answer:
        return self.config.answer()

    @property
    def task(self) -> Literal["autoencoder", "classifier", "regression"]:  # type: ignore[override]  # read-only here
        """What is learned."""
        return self._answer.task

    @property
    def image_shape(self) -> tuple[int, int] | None:  # type: ignore[override]  # read-only here
        """(height, width) of a case, if the function says so."""
        return self._answer.image_shape

    def load(self) -> ProblemData:
        """What the function returned."""
        return self._answer.data

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """The function's model, initialised at the generator's seed; in float32 on the CPU.

        Raises:
            KfacError: The function fails, or returns something else than before.
        """
        config, answer = self.config, self._answer
        if answer.problem is not None:
            return answer.problem.build_model(generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        model: Any = answer.model
        if isinstance(model, nn.Module):
            again = call_at(seed, config.target, config.folder, config.arguments)
            model = read_answer(again, config.target).model
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
        problem = self._answer.problem
        return values if problem is None else problem.picture(values)
