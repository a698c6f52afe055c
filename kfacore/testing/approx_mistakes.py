"""Why a matrix is not the one it should be: it may be the one that a well-known mistake gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kfacore.roles.block import Block
from kfacore.schema.slots import PiRule, literals_of
from kfacore.testing.base import differs
from kfacore.testing.cases import ApproxCase

__all__ = ["PI_RULES", "likely_cause"]

Fisher = Callable[..., Tensor]
"""The matrix from its definition: ``fisher(case, gamma, pi=...)``."""

PI_RULES: tuple[PiRule, ...] = (*literals_of(PiRule), None)


def likely_cause(
    fisher: Fisher, what: str, found: Tensor, wanted: Tensor, case: ApproxCase, gamma: float, pi: PiRule
) -> str:
    """Which mistakes give the matrix that was found, else where it differs most.

    Args:
        fisher: The matrix from its definition.
        what: ``"multiply"`` or ``"solve"``.
        found: What it was.
        wanted: What it should be.
        case: Of which statistics.
        gamma: The damping.
        pi: How it is split.
    """
    causes = []
    for text, make in _mistakes(fisher, what, case, gamma, pi).items():
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # a mistake may be singular
            if differs(found, make()) < 1e-8:
                causes.append(text)
    if causes:
        return f"it agrees with {' and with '.join(causes)}"
    return f"the largest difference is in {_worst_block(found - wanted, wanted, case.layers)}"


def _mistakes(fisher: Fisher, what: str, case: ApproxCase, gamma: float, pi: PiRule) -> dict[str, Callable[[], Tensor]]:
    """Matrices that well-known mistakes give."""

    def matrix(of: ApproxCase = case, strength: float = gamma, split: PiRule = pi) -> Tensor:
        F = fisher(of, strength, pi=split)
        return F if what == "multiply" else torch.linalg.inv(F)

    def permuted(order: Tensor) -> Tensor:
        return matrix()[order][:, order]

    rows = _rows_first(case.layers)
    found: dict[str, Callable[[], Tensor]] = {
        **{
            f"pi = {other!r}: gamma is split the wrong way": partial(matrix, split=other)
            for other in PI_RULES
            if other != pi
        },
        "no damping at all": lambda: matrix(strength=0.0),
        "gamma squared in place of gamma": lambda: matrix(strength=gamma**2),
        "the square root of gamma in place of gamma: where gamma^2 belongs, gamma was added": (
            lambda: matrix(strength=gamma**0.5)
        ),
        "the last mini-batch alone: no running average": lambda: matrix(ApproxCase(case.layers, case.batches[-1:])),
        "blocks whose rows are stacked, not their columns": partial(permuted, rows),
        "moments of blocks whose rows are stacked, not their columns": partial(permuted, rows.argsort()),
        "the inverse matrix: solve and multiply are exchanged": lambda: torch.linalg.inv(matrix()),
    }
    passes, cases = case.batches[0][0].gradients.shape[0], case.batches[0][0].cases
    if passes > 1:
        mean = partial(matrix, _scaled(case, passes**-0.5))
        found["passes that are averaged: second moments are summed over passes and divided by cases alone"] = mean
    found["a sum over cases: second moments are means over cases"] = partial(matrix, _scaled(case, cases**0.5))
    positions = case.batches[0][0].positions or 1
    if positions > 1:
        mean = partial(matrix, _scaled(case, positions**-0.5))
        found["rows that are averaged: gradients are summed over a case's rows and divided by S alone"] = mean
    for k in range(1, len(case.batches)):
        early = ApproxCase(case.layers, case.batches[:k])
        found[f"the statistics after mini-batch {k}: stale"] = partial(matrix, early)
    return found


def _scaled(case: ApproxCase, factor: float) -> ApproxCase:
    """The case with all output gradients scaled."""
    batches = [[replace(s, gradients=factor * s.gradients) for s in samples] for samples in case.batches]
    return ApproxCase(case.layers, batches)


def _rows_first(layers: list[Block]) -> Tensor:
    """Where each entry of the column-stacked vector lies in the row-stacked one."""
    found, start = [], 0
    for layer in layers:
        found.append(torch.arange(layer.size).reshape(layer.d_out, layer.d_in).T.reshape(-1) + start)
        start += layer.size
    return torch.cat(found)


def _worst_block(difference: Tensor, wanted: Tensor, layers: list[Block]) -> str:
    """The pair of layers whose block differs most."""
    sizes = [layer.size for layer in layers]
    rows = [torch.split(row, sizes, dim=1) for row in torch.split(difference, sizes)]
    norms = {(i, j): float(block.norm()) for i, row in enumerate(rows) for j, block in enumerate(row)}
    i, j = max(norms, key=lambda key: norms[key])
    share = norms[i, j] / float(wanted.norm())
    return f"block ({layers[i].name}, {layers[j].name}), {share:.1e} of the whole"
