"""``--init FILE``: start from given parameters instead of the problem's own initialisation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfacore.errors import DataError, nearest
from kfacore.lab.data import read_npz
from kfacore.lab.training.checkpoint import read_model

__all__ = ["load_parameters"]


def load_parameters(model: nn.Module, path: Path) -> dict[str, Any]:
    """Copy the parameters in a file into a model, and the buffers (running means, say) that are in it too.

    Args:
        model: The model; each of its parameters must be in the file under its own name, for example ``"0.weight"``.
        path: ``.safetensors``, ``.npz``, or ``.pt``, a checkpoint of a run; none of them can run code.

    Returns:
        What the manifest records: the file's name and SHA-256.

    Raises:
        DataError: The file is missing, damaged or of another kind; a parameter is missing, unknown, not finite or has
            the wrong shape. The message names it.
    """
    if not path.is_file():
        raise DataError(f"--init {path}: there is no such file")
    if path.suffix not in _READERS:
        raise DataError(
            f"--init {path}: found a '{path.suffix}' file; give a .safetensors or .npz file of parameters, or a "
            "checkpoint (.pt) of a run"
        )
    try:
        given = _READERS[path.suffix](path)
    except OSError as error:
        raise DataError(f"--init {path} cannot be read: {error.strerror or error}") from error
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    stored = {name: value for name, value in given.items() if name in buffers}
    _check({name: value for name, value in given.items() if name not in buffers}, parameters, path)
    for name, value in stored.items():
        _check_shape(name, value, buffers[name], path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(given[name])
        for name, value in stored.items():
            buffers[name].copy_(value)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _check(given: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in parameters if name not in given]
    extra = [name for name in given if name not in parameters]
    if extra:
        hint = nearest(extra[0], missing or parameters)
        raise DataError(f"--init {path}: {_some(extra)} is no parameter of the model; {hint}")
    if missing:
        raise DataError(f"--init {path}: parameter {_some(missing)} of the model is missing in the file")
    for name, parameter in parameters.items():
        value = given[name]
        _check_shape(name, value, parameter, path)
        if not value.is_floating_point():
            raise DataError(f"--init {path}: '{name}' has dtype {value.dtype}, the model needs floating point")
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"--init {path}: '{name}' holds NaN or infinity")


def _check_shape(name: str, value: Tensor, wanted: Tensor, path: Path) -> None:
    if value.shape != wanted.shape:
        raise DataError(
            f"--init {path}: '{name}' has shape {tuple(value.shape)}, the model needs {tuple(wanted.shape)}"
        )


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        arrays = read_npz(path)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except (DataError, TypeError) as error:  # TypeError: an array of text or dates, which torch cannot hold
        raise DataError(
            f"--init {error}. Needed is an .npz file with one array of numbers for each parameter of the model, under "
            "the parameter's name, as numpy.savez(file, **arrays) writes it"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DataError(
            f"--init {path} is not a readable .safetensors file: {error}. Needed is a file with the tensors of the "
            "model's state_dict, as safetensors.torch.save_file(state, file) writes it"
        ) from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        return dict(read_model(path))
    except DataError as error:
        raise DataError(f"--init {error}") from error


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_checkpoint}
