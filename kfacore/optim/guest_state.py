"""Curvature in a torch optimizer's state: tensors alone, each at a parameter of the block that it belongs to.

Whatever reads states of optimizers (``torch.load(weights_only=True)``, safetensors, distributed checkpoints) finds
tensors under names. How they hang together, and numbers and words, is JSON as bytes, one tensor more. Which parameter
a tensor stands at is told by lists with one entry a block, and matters to nobody here: names are unique.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PREFIX", "pack", "split_state", "unpack"]

PREFIX = "kfac."
"""Begins every name of ours."""

_TREE = PREFIX + "tree"
_TENSOR = "tensor:"


def pack(nest: Any, owners: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Tensors by parameter and name.

    Args:
        nest: Dicts with words for keys, lists, tensors, numbers, words.
        owners: Number of a parameter for each block.
    """
    found: dict[int, dict[str, Tensor]] = {}

    def walk(value: Any, path: str, owner: int) -> Any:
        if isinstance(value, Tensor):
            found.setdefault(owner, {})[PREFIX + path] = value.detach().clone(memory_format=torch.contiguous_format)
            return _TENSOR + path
        if isinstance(value, Mapping):
            return {str(key): walk(each, f"{path}.{key}" if path else str(key), owner) for key, each in value.items()}
        if isinstance(value, list | tuple):
            each_owner = owners if len(value) == len(owners) else [owner] * len(value)
            return [walk(each, f"{path}.{i}", at) for i, (each, at) in enumerate(zip(value, each_owner, strict=True))]
        return value

    tree = json.dumps(walk(nest, "", owners[0]))
    found.setdefault(owners[0], {})[_TREE] = torch.frombuffer(bytearray(tree.encode()), dtype=torch.uint8)
    return found


def unpack(tensors: Mapping[str, Tensor]) -> Any:
    """The nest, from all tensors by name, wherever they stood; None if there is none."""
    if _TREE not in tensors:
        return None

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            return tensors[PREFIX + value.removeprefix(_TENSOR)].clone()
        if isinstance(value, dict):
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
