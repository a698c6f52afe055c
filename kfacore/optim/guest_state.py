"""Curvature in a torch optimizer's state: tensors alone, each at a parameter of the block that it belongs to.

Whatever reads states of optimizers (``torch.load(weights_only=True)``, safetensors, distributed checkpoints) finds
tensors under names. How they hang together, and words, is JSON as bytes, one tensor more; numbers are one more again,
and both are filled up to whole pages: readers that load in place want tensors of the sizes that they know, whatever
step it is. Which parameter a tensor stands at is told by lists with one entry a block, and matters to nobody here:
names are unique.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.errors import ConfigError

__all__ = ["joined_state", "mark", "marked", "own_state", "pack", "require_form", "split_state", "unpack"]

PREFIX = "kfac."
"""Begins every name of ours."""

_STEPS = PREFIX + "steps"
_TREE = PREFIX + "tree"
_NUMBERS = PREFIX + "numbers"
_TENSOR = "tensor:"
_INT, _FLOAT = "int", "float"
_EXACT = 2**53
"""Integers up to here are float64 numbers."""

_PAGE = 4096
"""Bytes of the tree, and numbers, that are filled up to whole multiples."""


def pack(nest: Any, owners: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Tensors by parameter and name.

    Args:
        nest: Dicts with words for keys, lists, tensors, numbers, words.
        owners: Number of a parameter for each block.
    """
    found: dict[int, dict[str, Tensor]] = {}
    numbers: list[float] = []

    def walk(value: Any, path: str, owner: int) -> Any:
        if isinstance(value, Tensor):
            found.setdefault(owner, {})[PREFIX + path] = value.detach().clone(memory_format=torch.contiguous_format)
            return _TENSOR + path
        if isinstance(value, Mapping):
            return {str(key): walk(each, f"{path}.{key}" if path else str(key), owner) for key, each in value.items()}
        if isinstance(value, list | tuple):
            each_owner = owners if len(value) == len(owners) else [owner] * len(value)
            return [walk(each, f"{path}.{i}", at) for i, (each, at) in enumerate(zip(value, each_owner, strict=True))]
        if isinstance(value, float) or (type(value) is int and abs(value) <= _EXACT):
            numbers.append(float(value))
            return {_FLOAT if isinstance(value, float) else _INT: len(numbers) - 1}
        return value

    tree = json.dumps(walk(nest, "", owners[0])).encode()
    tree += b" " * (-len(tree) % _PAGE)
    numbers += [0.0] * (-len(numbers) % _PAGE)
    found.setdefault(owners[0], {})[_NUMBERS] = torch.tensor(numbers, dtype=torch.float64)
    found.setdefault(owners[0], {})[_TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    return found


def unpack(tensors: Mapping[str, Tensor]) -> Any:
    """The nest, from all tensors by name, wherever they stood; None if there is none.

    Raises:
        ConfigError: Some are missing.
    """
    if _TREE not in tensors:
        return None
    numbers = tensors[_NUMBERS].tolist() if _NUMBERS in tensors else []  # the last version had them in the tree

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            name = PREFIX + value.removeprefix(_TENSOR)
            if name not in tensors:
                raise ConfigError(
                    f"the state lacks {name}: a reader that loads in place (torch.distributed.checkpoint) takes up "
                    "only what the optimizer has already; let it take one step before its state is read into"
                )
            return tensors[name].clone()
        if isinstance(value, dict):
            if numbers and len(value) == 1 and next(iter(value)) in (_INT, _FLOAT):
                ((kind, place),) = value.items()
                return int(numbers[place]) if kind == _INT else numbers[place]
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    return walk(json.loads(bytes(tensors[_TREE].to(device="cpu", dtype=torch.uint8).numpy())))


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state of an optimizer without what is ours, and that.

    Scalars are copied: torch's optimizers take up the tensors of their counts as they are, so that two would share one.
    """
    ours: dict[str, Tensor] = {}
    rest: dict[Any, Any] = {}
    for key, entry in state["state"].items():
        ours |= {name: value for name, value in entry.items() if str(name).startswith(PREFIX)}
        others = {
            name: value.clone() if isinstance(value, Tensor) and value.dim() == 0 else value
            for name, value in entry.items()
            if not str(name).startswith(PREFIX)
        }
        if others or not entry:
            rest[key] = others
    return {**state, "state": rest}, ours


def require_form(state: Any) -> None:
    """Refuse what is not the state of an optimizer.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"the state is not of an optimizer: it is a {type(state).__name__}, not a dict")
    if not {"state", "param_groups"} <= set(state):
        raise ConfigError(
            f"the state is not of an optimizer: it has {', '.join(map(str, state)) or 'nothing'}, not state and "
            "param_groups"
        )
    if not isinstance(state["state"], Mapping) or not isinstance(state["param_groups"], list):
        raise ConfigError("the state is not of an optimizer: its state must be a dict, its param_groups a list")


def own_state(state: Mapping[str, Any]) -> Any:
    """What `KFAC` or `Preconditioned` keep in a state of an optimizer; None if there is nothing of theirs.

    Raises:
        ConfigError: It is not the state of an optimizer.
    """
    require_form(state)
    if "kfac" in state:  # a state of KFAC 0.2 and before
        return state["kfac"]
    return unpack(split_state(state)[1])


def joined_state(
    base: Mapping[str, Any], own: Sequence[Tensor], first: Sequence[Tensor], curvature: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of the base optimizer with what is ours.

    Args:
        base: Its own, marks among it.
        own: All its parameters.
        first: The first parameter of each block.
        curvature: What is to be kept.
    """
    state, _ = split_state(base)
    for key, entry in base["state"].items():
        if _STEPS in entry:  # one tensor for all, which some formats refuse
            state["state"].setdefault(key, {})[_STEPS] = entry[_STEPS].clone()
    numbers: dict[int, int] = {}
    for p in own:
        numbers.setdefault(id(p), len(numbers))
    for owner, tensors in pack(curvature, [numbers[id(p)] for p in first]).items():
        state["state"][owner] = {**state["state"].get(owner, {}), **tensors}
    return state


def mark(state: Any, parameters: Sequence[Tensor], steps: int) -> None:
    """Leave the number of steps at parameters that moved: tools ask whether there is a state, and SGD's is empty."""
    count = torch.full((), float(steps))
    for p in parameters:
        state[p][_STEPS] = count


def marked(state: Mapping[str, Any], own: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that have such a mark in a saved state, whose keys are numbers, or names."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    return [p for key, p in zip(keys, own, strict=True) if _STEPS in state["state"].get(key, {})]
