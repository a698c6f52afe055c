"""What layer types made of linear maps share: which modules and parameters they may read, and a map as a block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parameter import is_lazy

from kfacore.roles import Block, Layer, Use
from kfacore.roles.layer import Emit

__all__ = [
    "LinearMap",
    "LinearMaps",
    "OneMap",
    "Slice",
    "Tell",
    "by_groups",
    "homogeneous",
    "is_unchanged",
    "part_of",
    "positions",
    "present",
    "qualified",
    "trainable",
]


def is_unchanged(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether a module computes what its kind does.

    Args:
        module: Of the kind or of a subclass.
        kind: The class whose computation is known.
        methods: What ``forward`` calls and a subclass or an instance might replace.
    """
    return isinstance(module, kind) and all(
        name not in vars(module) and getattr(type(module), name) is getattr(kind, name)
        for name in ("forward", *methods)
    )


def trainable(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that local name, if it is one and is trained.

    A tensor computed from other parameters (a parametrization, weight norm, pruning) has the name without being one:
    then what is trained is something else, and this is None.
    """
    holder, _, last = name.rpartition(".")
    parameter = module.get_submodule(holder)._parameters.get(last)
    return parameter if parameter is not None and not is_lazy(parameter) and parameter.requires_grad else None


def present(module: nn.Module, name: str) -> Tensor:
    """What has that name now: the parameter, or what stands in for it (`torch.func.functional_call`)."""
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def qualified(name: str, local: str) -> str:
    """The full name of a module's own parameter or block; the root module has no name."""
    return f"{name}.{local}" if name else local


def part_of(block: Block) -> str:
    """The end of a block's name."""
    return block.name.rpartition(".")[2]


def homogeneous(
    rows: Tensor,  # (..., d)
    bias: bool,
) -> Tensor:  # (..., d + 1) with a bias
    """The rows with a 1 at their end if there is a bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if bias else rows


class OneMap(Layer):
    """A module with one ``weight`` and perhaps a ``bias``, whose output is linear in both; groups may be separate."""

    @abstractmethod
    def groups(self, module: nn.Module) -> int:
        """Groups of units that see inputs of their own."""

    @abstractmethod
    def arrange(
        self,
        module: nn.Module,
        weight: Tensor,
    ) -> Tensor:  # ([groups,] d_out, *columns)
        """A view of a weight-shaped tensor: a unit's own weights are the columns, in as many dimensions as suit it."""

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """One block; none if the weight is frozen or computed from something else."""
        weight, bias = trainable(module, "weight"), trainable(module, "bias")
        if weight is None:
            return []
        groups = self.groups(module)
        view = self.arrange(module, weight)
        d_out = view.shape[0 if groups == 1 else 1]
        columns = weight.numel() // (groups * d_out)
        params = [qualified(name, local) for local in ("weight", "bias")[: 1 if bias is None else 2]]
        return [Block(name, columns + (bias is not None), d_out, bias is not None, groups=groups, params=tuple(params))]

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight as `arrange` has it, and the bias by groups."""
        views = [self.arrange(module, tensors["weight"])]
        if block.bias:
            views.append(by_groups(tensors["bias"], block.groups))
        return views

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """The matrix without its last column in the shape of the weight's view, and that column."""
        columns = self.arrange(module, present(module, "weight")).shape[2 if block.groups > 1 else 1 :]
        if not block.bias:
            return [torch.unflatten(matrix, -1, columns)]
        return [torch.unflatten(matrix[..., :-1], -1, columns), matrix[..., -1]]


def by_groups(
    units: Tensor,  # (..., groups * d_out)
    groups: int,
) -> Tensor:  # (..., [groups,] d_out)
    """Units of several groups, group by group."""
    return torch.unflatten(units, -1, (groups, -1)) if groups > 1 else units


@dataclass(frozen=True)
class LinearMap:
    """One of the linear maps inside a module.

    Attributes:
        part: Its block's name within the module.
        weight: The parameter with its weight, (units, inputs).
        bias: The parameter with its bias.
    """

    part: str
    weight: Slice
    bias: Slice | None = None

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """W x + b with the module's parameters of this moment, which may stand in for its own."""
        weight, bias = (None if each is None else each.present(module) for each in (self.weight, self.bias))
        assert weight is not None
        return linear(x, weight, bias)


@dataclass(frozen=True)
class Slice:
    """A parameter, or some of its rows.

    Attributes:
        name: Local name, which may have dots.
        rows: The first row and the one after the last, where several maps share the parameter.
    """

    name: str
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The rows as a view."""
        return parameter if self.rows is None else parameter[slice(*self.rows)]

    def full_name(self, module_name: str) -> str:
        """As `Block.params` names it."""
        return qualified(module_name, self.name) + ("" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]")

    def trained(self, module: nn.Module) -> Tensor | None:
        """The rows if the parameter is trained."""
        parameter = trainable(module, self.name)
        return None if parameter is None else self.of(parameter)

    def present(self, module: nn.Module) -> Tensor | None:
        """The rows of what has that name now; None if nothing has."""
        holder, _, last = self.name.rpartition(".")
        value: Tensor | None = getattr(module.get_submodule(holder), last)
        return None if value is None else self.of(value)


class LinearMaps(Layer):
    """A module made of several linear maps that hooks cannot see, each a block of its own."""

    @abstractmethod
    def maps(self, module: nn.Module) -> Sequence[LinearMap]:
        """All linear maps of the module, trained or not."""

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """One a map whose weight is trained."""
        found = []
        for each in self.maps(module):
            weight = each.weight.trained(module)
            if weight is None:
                continue
            biased = each.bias is not None and each.bias.trained(module) is not None
            (d_out, d_in), slices = weight.shape, (each.weight, each.bias) if biased else (each.weight,)
            params = tuple(part.full_name(name) for part in slices if part is not None)
            found.append(Block(qualified(name, each.part), d_in + biased, d_out, biased, params=params))
        return found

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The map's rows of its weight and its bias."""
        (each,) = [m for m in self.maps(module) if m.part == part_of(block)]
        slices = (each.weight, each.bias) if block.bias else (each.weight,)
        return [part.of(tensors[part.name]) for part in slices if part is not None]

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """The matrix without its last column, and that column."""
        return [matrix[:, :-1], matrix[:, -1]] if block.bias else [matrix]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """What went into the map, position by position."""
        return homogeneous(positions(use.inputs), block.bias)

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """As they are, position by position."""
        return positions(g)

    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        """What the use says of its rows."""
        return use.extras.get("counts")

    def tell(self, module: nn.Module, emit: Emit) -> Tell:
        """What applies a map and tells of it, if it is a block."""
        parts = {block.name for block in self.blocks("", module)}
        return Tell(module, emit, frozenset(parts))


@dataclass(frozen=True)
class Tell:
    """Applies linear maps of a module and tells of those that are blocks."""

    module: nn.Module
    emit: Emit
    parts: frozenset[str]

    def __call__(
        self,
        each: LinearMap,
        x: Tensor,  # (n, ..., d_in)
        **extras: Tensor,
    ) -> Tensor:  # (n, ..., d_out)
        """The map's output."""
        output = each.apply(self.module, x)
        if each.part in self.parts:
            self.emit(Use(each.part, x.detach(), output, extras))
        return output


def positions(
    values: Tensor,  # (n, ..., d)
) -> Tensor:  # (n, R, d)
    """All dimensions between the case and the last as one; a single vector is one case."""
    return values.reshape(values.shape[0] if values.dim() > 1 else 1, -1, values.shape[-1])
