"""Finding a model's blocks: which layer type reads which module, what modules share, what nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import PluginError, UnsupportedModelError
from kfacore.network import linear
from kfacore.network.blocks import ModelBlock, User, check_parameters, diagonal_block
from kfacore.roles.block import Block, Side
from kfacore.roles.layer import Layer

__all__ = ["find_layers", "strict_blocks", "unwrapped", "whole_model"]


def find_layers(model: nn.Module, layers: Sequence[Layer] = (), max_dim: int = 8192) -> list[ModelBlock]:
    """The blocks of a model's trainable parameters, in order of registration, as a `Linearizer` begins with them."""
    return whole_model(unwrapped(model), layers, max_dim)


def unwrapped(model: nn.Module) -> nn.Module:
    """Without what torch.compile, DataParallel and DistributedDataParallel put around it.

    Raises:
        UnsupportedModelError: A part of it is a TorchScript module.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # what torch.compile keeps the module under
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or '(the model itself)'} is a TorchScript module, into which neither hooks nor other "
                "parameters reach; train the module that it was made of, and script that afterwards"
            )
    return model


def whole_model(model: nn.Module, types: Sequence[Layer], max_dim: int) -> list[ModelBlock]:
    """Blocks for all trainable parameters of a model, in order of registration.

    Args:
        model: Any module without uninitialised parameters.
        types: Layer types; the first that matches a module reads it.
        max_dim: A side of a Kronecker product above it is diagonal.

    Raises:
        UnsupportedModelError: Nothing is trainable, or not in float32 or float64 on one device.
        PluginError: A layer type contradicts itself.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    readings = _readings(model, types)
    blocks, why = _joined(readings, names, max_dim)
    claimed = {id(parameter) for block in blocks for parameter in block.parameters}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in claimed and parameter.numel():
                claimed.add(id(parameter))
                reason = why.get(id(parameter)) or _unread(name, key, module)
                blocks.append(diagonal_block(names[id(parameter)], parameter, reason))
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    blocks.sort(key=lambda block: min(order[id(parameter)] for parameter in block.parameters))
    check_parameters(blocks)
    return blocks


def strict_blocks(model: nn.Module) -> list[ModelBlock]:
    """Linear modules with weights of their own, and nothing else: ``unsupported = "error"``.

    Raises:
        UnsupportedModelError: A trainable parameter lies in another kind of module, or is shared by two modules, or
            nothing is trainable; the message names the module.
    """
    blocks: list[ModelBlock] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        trainable = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if not trainable:
            continue
        shown = name or "(the model itself)"
        if not linear.is_linear(module):
            raise UnsupportedModelError(
                f"{shown}: {type(module).__name__} has trainable parameters ({', '.join(trainable)}) that cannot be "
                "preconditioned; supported: Linear. Use a supported layer or freeze it with requires_grad_(False)"
            )
        info = linear.strict_block(shown, module)
        local = tuple((key, module.get_parameter(key)) for key in ("weight", "bias")[: 1 + info.bias])
        for _, parameter in local:
            other = owners.setdefault(id(parameter), shown)
            if other != shown:
                raise UnsupportedModelError(
                    f"{shown}: shares a trainable parameter with {other}; tied weights cannot be preconditioned. "
                    "Give each module its own parameter"
                )
        user = User(shown, module, None, info, "", local)
        blocks.append(ModelBlock(info, tuple(parameter for _, parameter in local), (user,), True))
    check_parameters(blocks)
    return blocks


@dataclass
class _Reading:
    """A user with the parameters that it lies in."""

    user: User
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(id(parameter) for _, parameter in self.parameters)


def _readings(model: nn.Module, types: Sequence[Layer]) -> list[_Reading]:
    """What the types find, outer modules first: a module inside one that was read keeps what that left."""
    readings: list[_Reading] = []
    inside: list[tuple[nn.Module, set[int]]] = []
    for name, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        taken: set[int] = set()
        for outer, ids in inside:
            if module is not outer and any(module is each for each in outer.modules()):
                taken |= ids
        for user in read_module(name or "(the model itself)", module, types):
            reading = _Reading(user, parameters_of(user))
            if reading.ids and not taken & set(reading.ids):
                readings.append(reading)
                if any("." in key for key, _ in reading.parameters):
                    inside.append((module, set(reading.ids)))
    return readings


def read_module(name: str, module: nn.Module, types: Sequence[Layer]) -> list[User]:
    """The blocks that the first matching type finds in a module; a Linear that no type reads has the fast path's."""
    kind = next((each for each in types if each.matches(module)), None)
    if kind is not None:
        blocks = kind.blocks(name, module)
        return [User(name, module, kind, block, block.name[len(name) + 1 :]) for block in blocks]
    trainable = linear.trainable_of(module)
    if not linear.is_linear(module) or "weight" not in trainable:
        return []
    bias = "bias" in trainable
    weight = module.get_parameter("weight")
    return [User(name, module, None, Block(name, weight.shape[1] + bias, weight.shape[0], bias), "")]


class _Seen(dict[str, nn.Parameter]):
    """Remembers which of a module's parameters a layer type looks at."""

    def __init__(self, given: Mapping[str, nn.Parameter]) -> None:
        super().__init__(given)
        self.keys_seen: list[str] = []

    def __getitem__(self, key: str) -> nn.Parameter:
        if key not in self.keys_seen:
            self.keys_seen.append(key)
        return super().__getitem__(key)


def parameters_of(user: User) -> list[tuple[str, nn.Parameter]]:
    """Local names and parameters that a block lies in.

    Raises:
        PluginError: What the type shows of them does not fit the block; the type is named.
    """
    seen = _Seen(dict(user.module.named_parameters(remove_duplicate=False)))
    if user.type is None:
        views: list[Tensor] = [seen["weight"], seen["bias"]] if user.block.bias else [seen["weight"]]
    else:
        views = user.type.view(user.block, user.module, seen)
    parts = user.split(torch.empty(user.block.shape, device="meta"))
    if [view.shape for view in views] != [part.shape for part in parts]:
        raise PluginError(
            f"{user.name}: the layer type '{user.type.config.kind if user.type else 'linear'}' shows parameters of "
            f"shapes {[tuple(view.shape) for view in views]} and parts of the block of shapes "
            f"{[tuple(part.shape) for part in parts]}; `view` and `split` must agree"
        )
    return [(key, seen[key]) for key in seen.keys_seen]


def _joined(
    readings: list[_Reading], names: Mapping[int, str], max_dim: int
) -> tuple[list[ModelBlock], dict[int, str]]:
    """Readings that share parameters as one block where they agree; else why these parameters are diagonal."""
    blocks: list[ModelBlock] = []
    why: dict[int, str] = {}
    owners: dict[int, list[_Reading]] = {}
    for reading in readings:
        for key in reading.ids:
            owners.setdefault(key, []).append(reading)
    done: set[int] = set()
    for reading in readings:
        if id(reading) in done:
            continue
        sharing = _sharing(reading, owners)
        done |= {id(each) for each in sharing}
        if len({id(each.user.module) for each in sharing}) == 1:
            blocks += [_block([each], names, max_dim, "") for each in sharing if id(each) not in why]
            continue
        joined = _tied(sharing, names, max_dim) or _merged(sharing, names, max_dim)
        if joined is not None:
            blocks.append(joined)
            continue
        where = " and ".join(dict.fromkeys(each.user.name for each in sharing))
        for each in sharing:
            why |= {
                key: f"shared by {where}, which use it in different ways" for key in each.ids if len(owners[key]) > 1
            }
    return blocks, why


def _sharing(first: _Reading, owners: Mapping[int, list[_Reading]]) -> list[_Reading]:
    """All readings that are connected with it through shared parameters."""
    found, stack = [first], [first]
    while stack:
        for key in stack.pop().ids:
            for other in owners[key]:
                if not any(other is each for each in found):
                    found.append(other)
                    stack.append(other)
    return found


def _block(sharing: Sequence[_Reading], names: Mapping[int, str], max_dim: int, why: str) -> ModelBlock:
    first = sharing[0]
    info = first.user.block
    params = info.params or tuple(names[key] for key in first.ids)
    params = tuple(each.removeprefix("(the model itself).") for each in params)
    info = replace(info, params=params, why=why or info.why)
    if info.kind == "kron" and max(info.d_in, info.d_out) > max_dim:
        info = _narrowed(info, max_dim)
    users = tuple(
        replace(each.user, block=replace(each.user.block, params=params), local=tuple(each.parameters))
        for each in sharing
    )
    fast = len(sharing) == 1 and info.plain and _is_fast(users[0])
    return ModelBlock(info, tuple(parameter for _, parameter in first.parameters), users, fast)


def _narrowed(info: Block, max_dim: int) -> Block:
    sides: dict[str, Any] = {}
    if info.d_in > max_dim:
        sides["input_side"] = Side.DIAGONAL
    if info.d_out > max_dim:
        sides["output_side"] = Side.DIAGONAL
    if all(getattr(info, key) is side for key, side in sides.items()):
        return info
    return replace(info, **sides, why=info.why or f"a side is wider than max_dim = {max_dim}: its diagonal is kept")


def _is_fast(user: User) -> bool:
    """A Linear whose block is [W b] as the fast path has it."""
    if not linear.is_linear(user.module) or not isinstance(user.module._parameters.get("weight"), nn.Parameter):
        return False
    if user.block.bias != ("bias" in linear.trainable_of(user.module)):
        return False
    matrix = torch.empty(user.block.shape, device="meta")
    own, fast = user.split(matrix), linear.split_block(user.block, matrix)
    return len(own) == len(fast) and all(
        (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
        for a, b in zip(own, fast, strict=True)
    )


def _without_bias(reading: _Reading) -> _Reading | None:
    """The same reading with the weight alone; the bias is then a block of its own."""
    user = reading.user
    if not user.block.bias:
        return reading
    if not linear.is_linear(user.module):
        return None
    block = replace(user.block, bias=False, d_in=user.block.d_in - 1, params=user.block.params[:1])
    bare = replace(user, block=block)
    return _Reading(bare, parameters_of(bare))


def _tied(sharing: Sequence[_Reading], names: Mapping[int, str], max_dim: int) -> ModelBlock | None:
    """Embeddings and heads that share one weight (V, d); of more words than max_dim the head's diagonal is kept."""
    embeddings = [each for each in sharing if isinstance(each.user.module, nn.Embedding)]
    heads = [_without_bias(each) for each in sharing if linear.is_linear(each.user.module)]
    if not embeddings or not heads or len(embeddings) + len(heads) != len(sharing):
        return None
    found = [each for each in heads if each is not None and each.user.type is not None]
    weights = {key for each in (*embeddings, *found) for key in each.ids}
    if len(found) != len(heads) or len(weights) != 1:
        return None
    weight = found[0].parameters[0][1]
    tokens, width = weight.shape
    users = tuple(replace(each.user, local=tuple(each.parameters)) for each in (*embeddings, *found))
    if any(user.block.shape != (width, tokens) for user in users[: len(embeddings)]):
        return None
    name = embeddings[0].user.name
    why = f"one weight is used by {' and '.join(user.name for user in users)}"
    side = Side.FULL
    if tokens > max_dim:
        side, why = Side.DIAGONAL, f"{why}; {tokens} words are more than max_dim = {max_dim}: G is diagonal"
    info = Block(name, width, tokens, False, kind="tied", output_side=side, params=(names[id(weight)],), why=why)
    return ModelBlock(info, (weight,), users, heads=len(found))


def _merged(sharing: Sequence[_Reading], names: Mapping[int, str], max_dim: int) -> ModelBlock | None:
    """Modules of one type that share their weights: the uses of one are further rows of the other."""
    where = " and ".join(dict.fromkeys(each.user.name for each in sharing))
    bare = [_without_bias(each) for each in sharing]
    for readings in (sharing, bare):
        kept = [each for each in readings if each is not None]
        kinds = {(type(each.user.type), each.user.block.shape, each.user.block.kind, each.ids) for each in kept}
        if len(kept) == len(sharing) and len(kinds) == 1 and len({id(each.user.module) for each in kept}) == len(kept):
            return _block(kept, names, max_dim, f"shared by {where}: the uses of all are its rows")
    return None


def _unread(name: str, key: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if ".parametrizations" in f".{name}":
        return "a parametrisation computes weights from it"
    return f"no layer type reads {key} of {kind}"
