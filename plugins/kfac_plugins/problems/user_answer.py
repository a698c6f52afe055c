"""What a user's function may return, read into a model, data and a likelihood.

::

    {"model": model, "data": (x, y), "likelihood": "categorical"}     also "train", "test", "task", "image_shape"
    model, (x, y), "categorical"                                     the likelihood may be left out
    model, (train, test)                                             pairs, Splits, or torch data sets
    a kfacore.roles.Problem

A model is an `nn.Module`, or a function without arguments that makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from kfacore.errors import ConfigError, DataError, KfacError, nearest
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.data.infer import likelihood_of
from kfacore.registry import get_registry
from kfacore.roles import Likelihood, Problem, ProblemData, Split
from kfacore.roles.criterion import is_criterion, read_criterion
from kfacore.schema.slots import LikelihoodConfig

__all__ = ["Answer", "Task", "read_answer"]

Task = Literal["autoencoder", "classifier", "regression"]

_KEYS = ("model", "data", "train", "test", "likelihood", "task", "image_shape")
_NEEDED = (
    "needed is a table {'model': ..., 'data': (inputs, targets), 'likelihood': ...}, a tuple (model, data) or (model, "
    "data, likelihood), or a kfacore.roles.Problem"
)


@dataclass(frozen=True)
class Answer:
    """A problem in its parts.

    Attributes:
        model: The model, or what makes it.
        data: Training and test cases.
        likelihood: The likelihood's table, as in a file.
        reason: Why it is that one, if nobody said so.
        task: What is learned.
        image_shape: Of a case, for pictures of an autoencoder.
        problem: The whole, if the function returned a problem; model and data are then its own.
    """

    model: nn.Module | Callable[[], nn.Module]
    data: ProblemData
    likelihood: Mapping[str, Any]
    reason: str = ""
    task: Task = "regression"
    image_shape: tuple[int, int] | None = None
    problem: Problem | None = field(default=None)


def read_answer(value: Any, target: str) -> Answer:
    """Read what a function returned.

    Args:
        value: It.
        target: What the user calls the function, for messages.

    Raises:
        ConfigError: Something of it is none of the forms that are taken.
        DataError: The data is none of them.
    """
    if isinstance(value, Problem):
        return _of_problem(value, target)
    if isinstance(value, tuple) and len(value) in (2, 3):
        value = dict(zip(("model", "data", "likelihood"), value, strict=False))
    if not isinstance(value, Mapping):
        raise ConfigError(f"{target} returns a {type(value).__name__}; {_NEEDED}")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise ConfigError(f"{target} returns a table with the key {unknown[0]!r}, {nearest(str(unknown[0]), _KEYS)}")
    if "model" not in value or ("data" in value) == ("train" in value) or ("test" in value and "train" not in value):
        raise ConfigError(
            f"{target} returns a table with {', '.join(map(repr, value)) or 'nothing'}; needed are 'model' and either "
            "'data' or 'train' (with or without 'test')"
        )
    model = value["model"]
    if not isinstance(model, nn.Module) and not callable(model):
        raise ConfigError(
            f"{target}: the model is a {type(model).__name__}; needed is an nn.Module, or a function that makes one"
        )
    data = _data(value, target)
    table, reason = _likelihood(value.get("likelihood"), data.train.targets, target)
    task = value.get("task") or _task(data.train, table)
    if task not in get_args(Task):
        raise ConfigError(f"{target}: unknown task {task!r}, {nearest(str(task), get_args(Task))}")
    shape = value.get("image_shape")
    return Answer(model, data, table, reason, cast(Task, task), None if shape is None else (shape[0], shape[1]))


def _of_problem(problem: Problem, target: str) -> Answer:
    data = problem.load()
    defaults = getattr(getattr(problem, "config", None), "run_defaults", {})
    given = getattr(problem, "likelihood", None) or defaults.get("likelihood")
    table, reason = _likelihood(given, data.train.targets, target)
    task = getattr(problem, "task", None) or _task(data.train, table)
    return Answer(lambda: nn.Identity(), data, table, reason, task, problem.image_shape, problem)


def _task(train: Split, likelihood: Mapping[str, Any]) -> Task:
    if train.targets is train.inputs:
        return "autoencoder"
    return "classifier" if likelihood["kind"] == "categorical" else "regression"


def _data(table: Mapping[str, Any], target: str) -> ProblemData:
    """Training and test cases out of any form."""
    if "train" in table:
        train, test = table["train"], table.get("test")
    else:
        data = table["data"]
        if isinstance(data, ProblemData):
            return data
        pair = isinstance(data, tuple | list) and len(data) == 2
        whole = not pair or all(isinstance(part, Tensor | np.ndarray) for part in data)
        train, test = (data, None) if whole else data
    splits = [None if part is None else _split(part, target) for part in (train, test)]
    tensors = [t for split in splits if split is not None for t in (split.inputs, split.targets)]
    checksum = sha256_of_arrays(*(tensor.numpy() for tensor in tensors))
    return ProblemData(cast(Split, splits[0]), splits[1], checksum, target)


def _split(value: Any, target: str) -> Split:
    """Cases from a Split, a pair of arrays, an array alone (an autoencoder's), or a data set of torch.

    Raises:
        DataError: It is none of these.
    """
    if isinstance(value, Split):
        value = (value.inputs, value.targets)
    elif isinstance(value, TensorDataset):
        value = value.tensors
    elif isinstance(value, Dataset):
        value = _stacked(value, target)
    if isinstance(value, Tensor | np.ndarray):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise DataError(
            f"{target}: the data is a {type(value).__name__}; needed are (inputs, targets) as tensors or arrays, one "
            "of them alone for an autoencoder, or a torch data set with a length; two of these for training and test"
        )
    inputs = _tensor(value[0], f"{target}: inputs")
    return Split(inputs, inputs if value[1] is value[0] else _tensor(value[1], f"{target}: targets"))


def _stacked(data: Dataset[Any], target: str) -> Any:
    try:
        cases = [data[index] for index in range(len(data))]  # type: ignore[arg-type]  # the error is what is asked for
        return default_collate(cases)
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{target}: the data set cannot be read into tensors ({str(error).splitlines()[0]}); needed are a length "
            "and examples (input, target) of one shape, as tensors, arrays or numbers"
        ) from error


def _tensor(values: Any, where: str) -> Tensor:
    """On the CPU; real numbers as float32, whole ones as int64, truth values as 0.0 and 1.0."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiub":
            raise DataError(f"{where} have dtype {values.dtype}; needed are numbers")
        wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
        values = torch.from_numpy(np.ascontiguousarray(values.astype(np.int64) if wide else values))
    if not isinstance(values, Tensor):
        raise DataError(f"{where} are a {type(values).__name__}; needed is a tensor or an array")
    if values.is_complex():
        raise DataError(f"{where} are complex; needed are real numbers")
    real = values.is_floating_point() or values.dtype == torch.bool
    return values.detach().cpu().to(torch.float32 if real else torch.int64).contiguous()


def _likelihood(given: Any, y: Tensor, target: str) -> tuple[Mapping[str, Any], str]:
    """The likelihood as a table, as in a file, and why it is that one."""
    if given is None:
        kind, why = likelihood_of(y.numpy())
        if kind == "gaussian" and not y.is_floating_point():
            raise ConfigError(
                f"{target}: the targets are {why}, and no likelihood is returned; return 'likelihood': 'categorical' "
                "if they are classes, or targets of real numbers"
            )
        reason = f"{target}: the targets are {why}, so the likelihood is {kind} (--set likelihood=NAME chooses another)"
        return {"kind": kind}, reason
    if isinstance(given, str) and not is_criterion(given):
        return {"kind": given}, ""
    if isinstance(given, Mapping):
        return given, ""
    if isinstance(given, LikelihoodConfig):
        return given.model_dump(mode="json"), ""
    try:
        likelihood = given if isinstance(given, Likelihood) else read_criterion(given)
    except KfacError as error:
        raise type(error)(f"{target}: likelihood: {error}") from error
    kind = likelihood.config.kind
    known = {part.name: part for part in get_registry().components("likelihood")}
    if kind not in known or get_registry().load(known[kind]) is not type(likelihood):
        raise ConfigError(
            f"{target}: the likelihood {type(likelihood).__name__} is not registered, and a run must find it again by "
            "its name; return a name (kfac list likelihood), a table, or a loss of torch, or make it a plug-in"
        )
    return likelihood.config.model_dump(mode="json"), ""
