"""Which pairs of blocks the block-tridiagonal form should couple: what an update buys with each choice.

A small residual MLP, a residual CNN and a character GPT are trained for some steps. There the exact quadratic model is
asked how far an update of each form lowers it with its best step length. Numbers are ratios to the block-diagonal
update, so that they do not depend on the machine's speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.residual import NETS, Task
from kfacore import KFAC
from kfacore.curvature.forest import forest, mutual_information, nearest
from kfacore.curvature.kronecker import damp, ready
from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.lab.diagnostics import ExactModel, gamma_grid, inverses
from kfacore.lab.diagnostics.exact import dot
from kfacore.registry import get_registry
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments
from kfacore.roles.samples import Samples

__all__ = ["choices", "informations", "main", "measure"]

Pairs = list[tuple[int, int]]

_MOST_PASSES = 16
"""More backward passes than this, and targets are drawn."""

_DRAWS = 8


@dataclass(frozen=True)
class Choice:
    """A forest.

    Attributes:
        pairs: Its pairs.
        information: Sum of their mutual information, in nats.
    """

    pairs: Pairs
    information: float


def choices(exact: ExactModel, samples: Samples, gamma: float) -> dict[str, Choice]:
    """The forests that are compared, by name."""
    layers, adjacent = exact.layers, exact.following
    sharing = [
        (i, j)
        for j in range(len(layers))
        for i in range(j)
        if layers[i].plain and layers[j].plain and _rows(samples, i) == _rows(samples, j) != 0
    ]
    known = dict(zip(sharing, informations(layers, samples, sharing, gamma), strict=True))
    adjacent = [pair for pair in adjacent if pair in known]

    def choice(pairs: Pairs | None) -> Choice:
        pairs = pairs or []
        return Choice(pairs, sum(known[pair] for pair in pairs))

    own = [known[pair] for pair in adjacent]
    return {
        "execution order": choice(nearest(adjacent)),
        "most information": choice(forest(adjacent, own)),
        "least information": choice(forest(adjacent, [1.0 / max(value, 1e-300) for value in own])),
        "most, any pair": choice(forest(sharing, list(known.values()))),
    }


def informations(layers: Sequence[Block], samples: Samples, pairs: Pairs, gamma: float) -> list[float]:
    """Mutual information of pairs of plain blocks, in nats, from their damped factors, as the inverse has them."""
    plain = sorted({index for pair in pairs for index in pair})
    place = {index: position for position, index in enumerate(plain)}
    blocks, seen = [layers[index] for index in plain], [samples[index] for index in plain]
    local = [(place[i], place[j]) for i, j in pairs]
    like = next(s.gradients for s in seen if s is not None)
    moments = Moments((InputFactor, OutputFactor, InputCross, OutputCross), blocks, like, local)
    moments.update(seen, 0.0)
    strength = torch.tensor(gamma, dtype=torch.float64)
    A, G = ready(moments[InputFactor], 1.0), ready(moments[OutputFactor], 1.0)
    _, roots, _ = damp(blocks, A, G, strength, pi="net")
    found = []
    for (i, j), Ax, Gx in zip(local, moments[InputCross], moments[OutputCross], strict=True):
        sides = []
        for side, X in (("G", Gx), ("A", Ax)):
            whitened = roots[side][j].whiten(roots[side][i].whiten(X).T)
            sides.append(torch.linalg.svdvals(whitened).square().clamp(max=1.0 - 1e-12))
        found.append(float(mutual_information(*sides)))
    return found


def _rows(samples: Samples, index: int) -> int:
    found = samples[index]
    return 0 if found is None else int(found.gradients.shape[1])


def decreases(
    exact: ExactModel, samples: Samples, approx: str, gammas: Sequence[float], pairs: Pairs
) -> dict[float, float]:
    """What the re-scaled update lowers the quadratic model by at each gamma, (g^T Delta)^2 / (2 Delta^T B Delta)."""
    g = exact.gradient()
    built = get_registry().build("approx", approx)
    found = {}
    for gamma, inverse in inverses(built, exact.layers, samples, gammas, pi="net", pairs=pairs):
        update = inverse.solve(g)
        found[gamma] = dot(g, update) ** 2 / (2.0 * exact.quadratic_form(update))
    return found


def measure(task: Task, steps: Sequence[int], cases: int, seed: int) -> list[dict[str, Any]]:
    """Train one net and compare the forests after each of some numbers of steps.

    Returns:
        One row a number of steps and forest: pairs, information, and the decrease as a multiple of the block-diagonal
        one at training's gamma and, each at its own best, over two decades of gamma.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, (x, y) = task.build(), task.data(generator)
    optimizer = KFAC(model, likelihood="categorical", approx="tridiag", seed=seed)
    rows = []
    for step in range(1, max(steps) + 1):
        chosen = torch.randperm(len(x), generator=generator)[: task.batch]
        optimizer.step(x[chosen], y[chosen])
        if step in steps:
            rows += [{"step": step, **row} for row in _compare(optimizer, x, y, min(cases, task.cases), seed)]
    return rows


def _compare(optimizer: KFAC, x: torch.Tensor, y: torch.Tensor, cases: int, seed: int) -> list[dict[str, Any]]:
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))[:cases]
    exact = ExactModel(
        optimizer.model,
        optimizer.likelihood,
        x[chosen],
        y[chosen],
        weight_decay=optimizer.weight_decay,
        lam=float(optimizer.damping.lam),
    )
    drawn = torch.Generator().manual_seed(seed + 2)
    few = exact.passes <= _MOST_PASSES
    samples = exact.exact_samples() if few else exact.monte_carlo_samples(drawn, _DRAWS)
    gamma = float(optimizer.damping.gamma)
    grid = gamma_grid(gamma, 1, 2)
    base = decreases(exact, samples, "blockdiag", grid, [])
    rows = []
    for name, choice in choices(exact, samples, gamma).items():
        found = decreases(exact, samples, "tridiag", grid, choice.pairs)
        rows.append(
            {
                "forest": name,
                "pairs": len(choice.pairs),
                "information": choice.information,
                "at gamma": found[gamma] / base[gamma],
                "at best": max(found.values()) / max(base.values()),
                "chosen": [[exact.layers[i].name, exact.layers[j].name] for i, j in choice.pairs],
            }
        )
    return rows


def main(arguments: list[str]) -> int:
    """Print ratios to the block-diagonal update, and everything as JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pairs", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), action="append", help="only these; repeatable")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and tinyshakespeare.txt; generated without")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100], help="of training before each comparison")
    parser.add_argument("--cases", type=int, default=1000, help="of the exact model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("pairs", steps=options.steps, cases=options.cases, seeds=options.seeds, data=bool(options.data))
    for name in options.net or NETS:
        task = NETS[name](options.data)
        runs = [measure(task, options.steps, options.cases, seed) for seed in range(options.seeds)]
        rows = []
        for found in zip(*runs, strict=True):
            row: dict[str, Any] = {key: found[0][key] for key in ("forest", "step", "pairs")}
            row["nats"] = mean(each["information"] for each in found)
            for key in ("at gamma", "at best"):
                values = [each[key] for each in found]
                row |= {key: mean(values), f"{key}, least": min(values), f"{key}, most": max(values)}
            rows.append(row)
        report.table(f"{name}: decrease of the exact model over that of blockdiag", rows)
        report.tables[-1]["runs"] = runs
    report.save(options.json)
    return 0
