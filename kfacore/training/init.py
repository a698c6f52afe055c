"""``--init FILE``: start from given parameters instead of the problem's own initialisation."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfacore.errors import DataError, nearest

__all__ = ["load_parameters"]


def load_parameters(model: nn.Module, path: Path) -> dict[str, Any]:
    """Copy the parameters in a file into a model.

    Args:
        model: The model; each of its parameters must be in the file under its own name, for example ``"0.weight"``.
        path: ``.safetensors`` or ``.npz``; neither can run code.

    Returns:
        What the manifest records: the file's name and SHA-256.

    Raises:
        DataError: The file is missing, damaged or of another kind; a parameter is missing, unknown, not finite or has
            the wrong shape. The message names it.
    """
    if not path.is_file():
        raise DataError(f"--init {path}: there is no such file")
    if path.suffix not in _READERS:
        raise DataError(f"--init {path}: found a '{path.suffix}' file; give a .safetensors or .npz file of parameters")
    try:
        given = _READERS[path.suffix](path)
    except OSError as error:
        raise DataError(f"--init {path} cannot be read: {error.strerror or error}") from error
    parameters = dict(model.named_parameters())
    _check(given, parameters, path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(given[name])
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
        if value.shape != parameter.shape:
            raise DataError(
                f"--init {path}: '{name}' has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}"
            )
        if not value.is_floating_point():
            raise DataError(f"--init {path}: '{name}' has dtype {value.dtype}, the model needs floating point")
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"--init {path}: '{name}' holds NaN or infinity")


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:  # ours to close: numpy leaves it open when the file is no archive
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"--init {path} is not an .npz file: it holds a single array without a name")
            return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError, KeyError) as error:
        raise DataError(f"--init {path} is not a readable .npz file of numbers: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DataError(f"--init {path} is not a readable .safetensors file: {error}") from error


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
