"""Inputs on which the model itself does not run, told apart from a fault of ours, and said in one line."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import DataError
from kfacore.nest import tensors_of
from kfacore.network.draws import Draws
from kfacore.network.state import ModelState

__all__ = ["MISFITS", "misfit", "require_dense", "require_sizes"]

MISFITS = (TypeError, AttributeError, RuntimeError, ValueError, LookupError)
"""What torch and Python raise where a module is given something that it cannot take."""

_OURS = str(Path(__file__).parents[1])


def misfit(model: nn.Module, inputs: Any, error: Exception) -> DataError | None:
    """Why a mini-batch cannot be served, if it is the mini-batch's fault.

    The model is run once more, as its author would run it: what it raises then is not of our making. Nothing is
    changed by that, neither buffers nor generators.

    Args:
        model: The model.
        inputs: What it was given.
        error: What was raised while it was served.

    Returns:
        The refusal; None where the model runs on the inputs, or where memory was short.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return None
    try:
        require_dense("inputs", inputs)
    except DataError as refusal:
        return refusal
    if next(tensors_of(inputs), None) is None:
        return DataError(f"inputs: they hold no tensor, and the model does not run on them ({_line(error)})")
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    draws = Draws(model, device)
    draws.look()
    before, state = draws.state(), ModelState(model)
    try:
        with torch.no_grad(), draws.replaying(before):
            model(inputs)
    except torch.OutOfMemoryError:
        return None
    except MISFITS as own:
        return DataError(
            f"inputs: the model does not run on them ({_line(own)}{_place(own)}); it was given {_form(inputs)}"
        )
    finally:
        state.put_back()
    return None


def require_dense(what: str, value: Any) -> None:
    """Refuse tensors whose entries do not lie in a grid.

    Raises:
        DataError: One of them is sparse or nested.
    """
    require_sizes(what, value)
    for tensor in tensors_of(value):
        if tensor.layout != torch.strided:
            raise DataError(f"{what}: found a sparse tensor ({tensor.layout}); make it dense with .to_dense()")


def require_sizes(what: str, value: Any) -> None:
    """Refuse tensors that have no sizes, or no values.

    Raises:
        DataError: One of them is nested, or on the device ``meta``.
    """
    if any(tensor.is_meta for tensor in tensors_of(value)):
        raise DataError(f"{what}: they are on meta, where tensors have shapes and no values; give the data themselves")
    if any(tensor.is_nested for tensor in tensors_of(value)):
        raise DataError(f"{what}: found a nested tensor; pad it with .to_padded_tensor(0.0), and give the mask")


def _line(error: Exception) -> str:
    """The error's first line, with its kind."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _place(error: Exception) -> str:
    """Where the user's own code raised it, if any of it did."""
    foreign = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS, str(Path(torch.__file__).parent), sys.prefix, "<"))
    ]
    return f", line {foreign[-1].lineno} of {foreign[-1].filename}" if foreign else ""


def _form(value: Any) -> str:
    """A nest with shapes in place of tensors, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    names = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(value))
    return f"a {type(value).__name__} with tensors of shapes {names}"
