"""What `KFAC` does with every parameter of a model, and why: `KFAC.explain`.

Before the first step that is what modules and sizes tell. The first mini-batch tells the rest: which blocks the fast
path serves, how J v is taken, what is coupled with what, which blocks' rows do not account for their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from kfacore.curvature.owned import Owned
from kfacore.network import ModelBlock
from kfacore.optim.footprint import Memory, amount, block_memory, divided
from kfacore.roles.block import Side

if TYPE_CHECKING:
    from kfacore.curvature.joined import Joined
    from kfacore.optim.kfac import KFAC

__all__ = ["Explanation", "Facts", "Row", "explain"]

_LATER = "known after the first step"


@dataclass(frozen=True)
class Row:
    """One parameter, or one slice of it that is a block of its own.

    Attributes:
        parameter: Qualified name, with the rows where it is a slice: ``"att.in_proj_weight[0:4]"``.
        shape: Shape of the whole parameter.
        block: Name of its block, what is preconditioned together; empty where it has none.
        kind: ``"kron"``, ``"full"``, ``"diagonal"``, ``"tied"``; ``"frozen"``, ``"empty"`` or ``"lazy"`` where it has
            no block.
        groups: Matrices of the block.
        d_in: Width of the input side, 1 for a bias included.
        d_out: Width of the output side.
        input_side: What is kept of A: ``"full"`` or ``"diagonal"``; empty where there is no such side.
        output_side: What is kept of G, likewise.
        served_by: The approximation by name, or ``"built-in"``.
        path: ``"fast"`` or ``"general"``; ``"fast or general"`` before the first step, ``"not used"`` where the last
            mini-batch did not use it.
        coupled: Blocks that it is coupled with.
        alone: Why with none; empty where the approximation couples nothing.
        memory: Of the whole block, in this process; other parameters of the block share it.
        owner: The process that keeps its averages and factors; empty where all do.
        why: Why it is as it is; empty where it is the usual.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str = ""
    kind: str = "frozen"
    groups: int = 1
    d_in: int = 0
    d_out: int = 0
    input_side: str = ""
    output_side: str = ""
    served_by: str = ""
    path: str = ""
    coupled: tuple[str, ...] = ()
    alone: str = ""
    memory: Memory = field(default_factory=Memory)
    owner: str = ""
    why: str = ""


@dataclass(frozen=True)
class Facts:
    """How the whole model is served.

    Attributes:
        seen: Whether a mini-batch was looked at; if not, the others are not known yet.
        way: How J v is taken: ``"known products"`` (all blocks fast, all directions in one pass), ``"forward"`` mode or
            ``"double"`` backward, one pass a direction, or ``"none"``.
        why_way: Why not in forward mode.
        cut: Whether mini-batches are cut by examples.
        why_whole: Why they are not.
        draws: Generators that the model draws from.
        mixes: Whether an example's outputs depend on other examples.
    """

    seen: bool
    way: str = ""
    why_way: str = ""
    cut: bool = True
    why_whole: str = ""
    draws: tuple[str, ...] = ()
    mixes: bool = False


@dataclass(frozen=True)
class Explanation:
    """A table to print, and a list of records.

    Attributes:
        rows: One a parameter in order of registration, one a slice where blocks share it.
        facts: How the whole model is served.
        notes: What was found out about blocks, one line each.
        together: Memory that belongs to all blocks together, as the moments of an exact Fisher.
        parameters: Bytes of the trainable parameters themselves.
        divided: With ``approx.memory = "owner"``, numbers of processes and bytes of averages and factors that the one
            of them keeps which keeps most.
    """

    rows: tuple[Row, ...]
    facts: Facts
    notes: tuple[str, ...]
    together: Memory
    parameters: int
    divided: tuple[tuple[int, int], ...] = ()

    @property
    def memory(self) -> Memory:
        """Of all blocks, each counted once."""
        total = self.together
        for memory in {row.block: row.memory for row in self.rows if row.block}.values():
            total = total + memory
        return total

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain values, for JSON."""
        return [
            asdict(row) | {"shape": list(row.shape), "coupled": list(row.coupled), "memory": row.memory.record()}
            for row in self.rows
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        facts = asdict(self.facts) | {"draws": list(self.facts.draws)}
        total = self.memory.record() | {"parameters": self.parameters}
        found = {"parameters": self.records(), "model": facts, "notes": list(self.notes), "memory": total}
        return found | ({"divided": [list(each) for each in self.divided]} if self.divided else {})

    def __iter__(self) -> Iterator[Row]:
        """Its rows."""
        return iter(self.rows)

    def __str__(self) -> str:
        """The table, what holds for the whole model, and notes."""
        return "\n".join([_table(self.rows), *self._lines()])

    def _lines(self) -> list[str]:
        facts = self.facts
        lines = [f"memory: {self.memory}; parameters {amount(self.parameters)}"]
        if self.divided:
            told = ", ".join(f"{amount(size)} of {count}" for count, size in self.divided)
            lines.append(f"memory = owner: most of moments and factors that one process keeps: {told} processes")
        if not facts.seen:
            lines.append("paths, J v, cuts and couplings are found out in the first step")
        else:
            reason = f" ({facts.why_way})" if facts.why_way else ""
            lines.append(f"J v: {facts.way}{reason}")
            lines.append("mini-batches are cut by examples" if facts.cut else f"one pass: {facts.why_whole}")
            if facts.draws:
                lines.append(f"the model draws from {', '.join(facts.draws)}; draws are replayed")
            if facts.mixes:
                lines.append("examples may depend on each other: everything is of the whole mini-batch")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def explain(optimizer: KFAC) -> Explanation:
    """What the optimizer does with every parameter; see `KFAC.explain`."""
    linearizer = optimizer.linearizer
    blocks, joined = linearizer.layers, optimizer.curvature()
    names = {parameter: name for name, parameter in linearizer.model.named_parameters()}
    by_parameter: dict[str, list[Row]] = {}
    memories, together = ([], Memory()) if joined is None else block_memory(optimizer, joined)
    for index, block in enumerate(blocks):
        assert joined is not None
        common = _row(optimizer, joined, index, memories[index])
        for label, parameter in _labels(block, names):
            row = Row(label, tuple(parameter.shape), **common)
            by_parameter.setdefault(names[parameter], []).append(row)
    rows = [
        row
        for name, parameter in linearizer.model.named_parameters()
        for row in by_parameter.get(name) or [_outside(name, parameter)]
    ]
    size = sum(p.numel() * p.element_size() for p in linearizer.parameters if not _lazy(p))
    of_groups = () if joined is None else divided(optimizer, joined, memories)
    return Explanation(tuple(rows), _facts(optimizer), tuple(linearizer.notes), together, size, of_groups)


def _labels(block: ModelBlock, names: dict[nn.Parameter, str]) -> list[tuple[str, nn.Parameter]]:
    """Names of what the block lies in, with their rows where the layer type tells them."""
    told = {label.split("[")[0]: label for label in block.info.params}
    return [(told.get(names[parameter], names[parameter]), parameter) for parameter in block.parameters]


def _lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _outside(name: str, parameter: nn.Parameter) -> Row:
    """A parameter that lies in no block."""
    if _lazy(parameter):
        return Row(name, (), kind="lazy", why="it gets its shape in the first step")
    shape = tuple(parameter.shape)
    if parameter.requires_grad:
        return Row(name, shape, kind="empty", why="it has no entries")
    return Row(name, shape, why="requires_grad is False: it is not trained")


def _row(optimizer: KFAC, joined: Joined, index: int, memory: Memory) -> dict[str, Any]:
    """What a row has of its block."""
    linearizer = optimizer.linearizer
    block = linearizer.layers[index]
    info = block.info
    coupled, alone = _coupled(optimizer, joined, index)
    sides = info.kind in ("kron", "tied")
    why = info.why
    if index in linearizer.reduced:
        why = "; ".join(filter(None, [why, "its positions are pooled: the rows of an example are one"]))
    return {
        "block": info.name,
        "kind": info.kind,
        "groups": info.groups,
        "d_in": info.d_in,
        "d_out": info.d_out,
        "input_side": str(info.input_side) if sides else "",
        "output_side": str(info.output_side) if sides else "",
        "served_by": joined.server(index),
        "path": _path(optimizer, index),
        "coupled": coupled,
        "alone": alone,
        "memory": memory,
        "owner": _owner(optimizer, index),
        "why": why,
    }


def _owner(optimizer: KFAC, index: int) -> str:
    """The process that keeps its curvature."""
    pre = optimizer.preconditioner
    if not isinstance(pre, Owned):
        return ""
    return f"rank {next(rank for rank, own in enumerate(pre.groups) if index in own)}"


def _path(optimizer: KFAC, index: int) -> str:
    linearizer = optimizer.linearizer
    if linearizer.paths is not None:
        return linearizer.paths[index]
    return "fast or general" if linearizer.layers[index].fast else "general"


def _coupled(optimizer: KFAC, joined: Joined, index: int) -> tuple[tuple[str, ...], str]:
    """The blocks that an approximation of pairs couples it with, or why there are none."""
    if optimizer.approx.structure != "chain":
        return (), ""
    linearizer, names = optimizer.linearizer, [block.info.name for block in optimizer.linearizer.layers]
    if joined.server(index) == "built-in":
        return (), "its curvature is built in, which couples nothing"
    if not linearizer.ordered:
        return (), _LATER
    partners = tuple(names[i if j == index else j] for i, j in joined.coupled if index in (i, j))
    if partners:
        return partners, ""
    if index in linearizer.reduced:
        return (), "its positions are pooled, so that it shares none with another block"
    if any(index in pair for pair in linearizer.following or ()):
        return (), "nearer pairs would close a circle with it"
    return (), "no block directly before or after it has the same rows and is used once"


def _facts(optimizer: KFAC) -> Facts:
    linearizer = optimizer.linearizer
    facts, paths = linearizer.facts, linearizer.paths
    if paths is None:
        return Facts(False)
    way = "known products" if linearizer.plain and linearizer.way == "forward" else str(linearizer.way)
    if not (optimizer.momentum.uses_model or optimizer.damping.uses_model):
        way = "not needed"
    if facts is None:  # unsupported = "error": checked to be so
        return Facts(True, way)
    return Facts(True, way, facts.reason, facts.cut, facts.whole, facts.draws, facts.mixes)


def _table(rows: Sequence[Row]) -> str:
    """Aligned columns; what belongs to a block stands with its first parameter."""
    lines = [
        ["parameter", "shape", "block", "kind", "A", "G", "served by", "path", "coupled with", "memory", "owner", "why"]
    ]
    shown: set[str] = set()
    for row in rows:
        cells = [row.parameter, "x".join(map(str, row.shape)) or "()"]
        if row.block and row.block in shown:
            lines.append([*cells, row.block, *[""] * 9])
            continue
        shown.add(row.block)
        kind = row.kind if row.groups == 1 else f"{row.kind} x{row.groups}"
        size = amount(row.memory.total) if row.block else ""
        sides = [_side(row, row.input_side, row.d_in), _side(row, row.output_side, row.d_out)]
        alone = f"alone: {row.alone}" if row.alone not in ("", _LATER) else row.alone
        coupled = ", ".join(row.coupled) or alone
        lines.append([*cells, row.block, kind, *sides, row.served_by, row.path, coupled, size, row.owner, row.why])
    kept = [i for i, column in enumerate(zip(*lines, strict=True)) if any(column[1:])]
    lines = [[line[i] for i in kept] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _side(row: Row, kept: str, width: int) -> str:
    if kept:
        return f"{width}" if kept == Side.FULL else f"{width} {kept}"
    return f"{width}" if row.block else ""
