"""Jobs divided among processes: each does its own, and sends what comes of it to the others.

Who does what is a pure function of the costs (`owners`). How a result travels is told by a `Wire`, since it may hold
what everybody has already, or can make cheaper than it can be sent. All, its maker too, take up what travelled, so that
everyone has the same bits in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kfacore import errors
from kfacore.errors import RankError
from kfacore.nest import tensors_of
from kfacore.parallel.ranks import Ranks

__all__ = ["Wire", "divided", "everyones", "owners", "refuse"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Wire(Generic[_Result]):
    """How results of jobs travel.

    Attributes:
        pack: Tensors of a result, and what else belongs to it: small, of plain Python.
        unpack: The number of the job, and what `pack` gave: the result.
    """

    pack: Callable[[_Result], tuple[list[Tensor], Any]]
    unpack: Callable[[int, list[Tensor], Any], _Result]


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Who does what, for processes that divide factors among themselves: largest first, each to the least busy.

    A pure function of its arguments, so that all processes agree without a word. No rank has more than the mean load
    plus one job (Graham 1969: at most 4/3 of the best division).

    Args:
        costs: Of each job, at least 0.
        ranks: Number of processes, at least 1.

    Returns:
        The rank of each job, in 0..ranks-1; of equal loads the lowest rank is taken, of equal costs the earliest job.
    """
    loads, found = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        found[i] = min(range(ranks), key=loads.__getitem__)
        loads[found[i]] += costs[i]
    return found


def divided(
    ranks: Ranks,
    costs: Sequence[float],
    run: Callable[[list[int]], list[_Result]],
    wire: Wire[_Result],
    device: torch.device,
) -> list[_Result]:
    """The results of all jobs, each done by its owner.

    Args:
        ranks: The processes.
        costs: Of each job.
        run: Does the jobs of these numbers here.
        wire: How their results travel.
        device: Where they compute.

    Raises:
        KfacError: A job failed, here or elsewhere: the same error on all processes.
    """
    who = owners(costs, ranks.size)
    mine = [i for i, owner in enumerate(who) if owner == ranks.rank]
    packed: dict[int, tuple[list[Tensor], Any]] = {}
    failure: Exception | None = None
    try:
        packed = {i: wire.pack(result) for i, result in zip(mine, run(mine), strict=True)}
    except Exception as error:
        failure = error
    told = None if failure is None else (type(failure).__name__, str(failure))
    forms = {i: [(tuple(t.shape), t.dtype) for t in tensors] for i, (tensors, _) in packed.items()}
    extra = {i: more for i, (_, more) in packed.items()}
    found = ranks.gather("division of the factors", (told, forms, extra))
    refuse(failure, [each[0] for each in found])
    results: dict[int, _Result] = {}
    for rank, (_, shapes, more) in enumerate(found):
        own = {i: tensors for i, (tensors, _) in packed.items()} if rank == ranks.rank else None
        arrived = _sent(ranks, rank, shapes, own, device)
        results |= {i: wire.unpack(i, tensors, more[i]) for i, tensors in arrived.items()}
    return [results[i] for i in range(len(costs))]


def refuse(failure: Exception | None, told: Sequence[tuple[str, str] | None]) -> None:
    """The first failure on all processes, in its own words: they name the layer, and it is nobody's own."""
    for rank, each in enumerate(told):
        if each is None:
            continue
        kind, message = each
        known = getattr(errors, kind, None)
        if failure is not None and (type(failure).__name__, str(failure)) == each:
            raise failure
        raise known(message) if isinstance(known, type) else RankError(f"rank {rank} failed: {kind}: {message}")


def everyones(ranks: Ranks, what: str, nest: Any, device: torch.device) -> list[Any]:
    """What each process has, tensors of any size in dicts, lists and what is small and plain, in their order.

    Args:
        ranks: The processes.
        what: What it is, for messages and the count of bytes.
        nest: This process's.
        device: Where tensors arrive.
    """
    own = [tensor.detach().to(device) for tensor in tensors_of(nest)]
    found = ranks.gather(what, (_emptied(nest, count()), [(tuple(tensor.shape), tensor.dtype) for tensor in own]))
    nests = []
    for rank, (tree, forms) in enumerate(found):
        mine = {0: own} if rank == ranks.rank else None
        nests.append(_filled(tree, _sent(ranks, rank, {0: forms}, mine, device, what)[0]))
    return nests


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor that travels apart."""

    index: int


def _emptied(nest: Any, places: Iterator[int]) -> Any:
    if isinstance(nest, Tensor):
        return _Place(next(places))
    if isinstance(nest, dict):
        return {key: _emptied(value, places) for key, value in nest.items()}
    return type(nest)(_emptied(value, places) for value in nest) if isinstance(nest, list | tuple) else nest


def _filled(tree: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(tree, _Place):
        return tensors[tree.index].clone()
    if isinstance(tree, dict):
        return {key: _filled(value, tensors) for key, value in tree.items()}
    return type(tree)(_filled(value, tensors) for value in tree) if isinstance(tree, list | tuple) else tree


def _sent(
    ranks: Ranks,
    source: int,
    forms: dict[int, list[tuple[tuple[int, ...], torch.dtype]]],
    own: dict[int, list[Tensor]] | None,
    device: torch.device,
    what: str = "inverses",
) -> dict[int, list[Tensor]]:
    """The tensors of one process's results, on all of them: one message a dtype."""
    places = [(i, k, *form) for i, each in forms.items() for k, form in enumerate(each)]
    found: dict[int, list[Tensor]] = {i: [torch.empty(0)] * len(each) for i, each in forms.items()}
    for dtype in dict.fromkeys(place[3] for place in places):
        chosen = [(i, k, shape) for i, k, shape, of in places if of == dtype]
        sizes = [torch.Size(shape).numel() for _, _, shape in chosen]
        if own is not None:
            flat = torch.cat([own[i][k].reshape(-1) for i, k, _ in chosen])
        else:
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        ranks.broadcast(what, flat, source)
        for (i, k, shape), part in zip(chosen, torch.split(flat, sizes), strict=True):
            found[i][k] = part.view(shape)
    return found
