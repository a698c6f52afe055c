"""Everything that `kfac inspect` measures of one model, as numbers and matrices; it prints and draws nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kfacore.curvature.faults import component, named
from kfacore.errors import ConfigError, KfacError, NumericalError, PluginError
from kfacore.lab.diagnostics.dense import DENSE_LIMIT
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.diagnostics.matrices import DenseReport, dense_report
from kfacore.lab.diagnostics.natural import NaturalGradient, natural_gradient
from kfacore.lab.diagnostics.quality import UpdateQuality, gamma_grid, inverses, measure_update
from kfacore.lab.diagnostics.subject import Subject
from kfacore.lab.diagnostics.theorem import InvarianceReport, measure_invariance
from kfacore.lab.diagnostics.verdict import verdict
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.samples import Samples

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["PARTS", "Inspection", "inspect_subject", "stretch"]

_EXACT_ENTRIES = 1 << 26
"""Most entries of output gradients that are kept: decides between the exact expectation and drawn targets."""

_DRAWN_ENTRIES = 1 << 25
_MOST_DRAWS = 8

_LARGE = 100_000
"""Parameters above which inverses are dear: fewer gammas, fewer iterations."""

_SEARCH = (1e-8, 2000)
_LARGE_SEARCH = (1e-3, 200)
"""Tolerance and most iterations of conjugate gradients, for small nets and for large ones, whose time is bounded."""

_PRODUCTS = 800
"""Most parameters of the exact Fisher as a matrix unless asked where every column is a product with it."""

_MOST_PASSES = 512
"""More backward passes than this for the exact expectation take longer than it is worth."""

_DEAR = 15.0
"""CPU seconds of one inverse above which an approximation is measured at three gammas only."""

PARTS = ("quality", "dense", "invariance")
"""What is measured of a model besides the natural gradient."""

Say = Callable[[str], None]


@dataclass
class Inspection:
    """What was measured.

    Attributes:
        subject: Of what.
        statistics: Where the factors come from, in words.
        natural: The exact natural gradient.
        quality: Every approximation at every gamma.
        dense: Matrices, if some layers are small enough.
        invariance: Theorem 1, if the model can be transformed.
        skipped: What was left out, by name, with the reason.
        failed: Approximations that failed while they ran, by name, with what they did.
        seconds: Time of each part.
    """

    subject: Subject
    statistics: str
    natural: NaturalGradient
    quality: list[UpdateQuality] = field(default_factory=list)
    dense: DenseReport | None = None
    invariance: list[InvarianceReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def verdict(self) -> str:
        """Which approximation is best here, and by how much, in a sentence."""
        return verdict(self.quality, self.subject.gamma)

    def at_gamma(self) -> list[UpdateQuality]:
        """Every approximation at the subject's own gamma."""
        return [row for row in self.quality if row.gamma == self.subject.gamma]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without matrices and vectors."""
        exact = self.subject.exact
        natural = {key: value for key, value in vars(self.natural).items() if key != "blocks"}
        return {
            "format": 1,
            "subject": self.subject.name,
            "problem": self.subject.problem,
            "step": self.subject.step,
            "seed": self.subject.seed,
            "parameters": exact.parameters,
            "cases": exact.cases,
            "lambda": exact.lam,
            "weight_decay": exact.weight_decay,
            "gamma": self.subject.gamma,
            "objective": exact.objective,
            "statistics": self.statistics,
            "natural_gradient": natural,
            "quality": [row.as_dict() for row in self.quality],
            "dense": None if self.dense is None else self.dense.as_dict(),
            "invariance": [row.as_dict() for row in self.invariance],
            "skipped": dict(self.skipped),
            "failed": dict(self.failed),
            "verdict": self.verdict() if self.quality else None,
            "seconds": dict(self.seconds),
        }


def inspect_subject(
    subject: Subject,
    registry: Registry,
    approximations: Mapping[str, Approximation],
    *,
    parts: Sequence[str] = PARTS,
    layers: tuple[int, int] | None = None,
    gammas: Sequence[float] | None = None,
    say: Say = lambda _: None,
) -> Inspection:
    """Measure everything that the model's size allows.

    Args:
        subject: The model.
        registry: Where the preconditioner of the conjugate gradients comes from.
        approximations: By name; one that refuses the model is skipped with its reason, one that fails is named.
        parts: What to measure besides the natural gradient, of `PARTS`.
        layers: First and last layer (from 1) of the dense matrices; `stretch` chooses if left out.
        gammas: The range of gamma; some decades around the subject's own if left out.
        say: Told what is going on.

    Raises:
        ConfigError: The layers do not exist.
        KfacError: Nothing could be measured.
    """
    exact = subject.exact
    large = exact.parameters > _LARGE
    clock = _Clock()
    _check_span(layers, exact.layers)
    samples, statistics = _statistics(subject)
    clock.lap("statistics")
    say(f"natural gradient: conjugate gradients on {exact.cases:,} examples")
    gradient = exact.gradient()
    natural = _natural(subject, registry, gradient, samples, large=large)
    result = Inspection(subject, statistics, natural, seconds=clock.laps)
    if subject.measured:
        names = ", ".join(subject.measured)
        result.skipped["units of inputs"] = (
            f"training measures the weights of {names} in the unit of their inputs (damping.units); here lambda and "
            "gamma act on the weights as they are"
        )
    clock.lap("natural gradient")
    if "quality" in parts:
        grid = list(gammas) if gammas is not None else gamma_grid(subject.gamma, *((2, 2) if large else (3, 2)))
        for name, approx in approximations.items():
            say(f"{name}: quality of its update at {len(grid)} gammas")
            _quality(result, gradient, samples, name, approx, grid)
            clock.lap(f"quality of {name}")
        if not result.quality:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in {**result.skipped, **result.failed}.items())
            raise ConfigError(f"no approximation could be measured: {reasons}")
    out = {*result.skipped, *result.failed}
    usable = {name: approx for name, approx in approximations.items() if name not in out}
    if "dense" in parts:
        _dense(result, samples, usable, _span(layers, exact, samples), say)
        clock.lap("dense")
    if "invariance" in parts:
        say("invariance: a random reparameterisation")
        result.invariance, skipped = measure_invariance(subject, usable)
        result.skipped.update(skipped)
        clock.lap("invariance")
    return result


def _quality(
    result: Inspection,
    gradient: Sequence[Tensor],
    samples: Samples,
    name: str,
    approx: Approximation,
    grid: Sequence[float],
) -> None:
    """One approximation over the range of gamma; a refusal or a failure is recorded, not raised."""
    subject, middle = result.subject, len(grid) // 2
    rows: list[UpdateQuality] = []

    def measure(gammas: Sequence[float]) -> None:
        exact = subject.exact
        for gamma, inverse in inverses(approx, exact.layers, samples, gammas, pi=subject.pi, pairs=exact.pairs):
            with named(approx, exact.layers, "solve"):
                rows.append(measure_update(exact, gradient, result.natural, inverse, name, gamma, component(approx)))
            del inverse  # before the next one takes its memory

    try:
        start = time.process_time()
        measure([grid[middle]])
        seconds = time.process_time() - start
        rest = [gamma for gamma in grid if gamma != grid[middle]]
        if seconds > _DEAR and len(rest) > 2:
            rest = [min(rest, key=lambda gamma: abs(math.log10(gamma / grid[middle]) - decade)) for decade in (-1, 1)]
            result.skipped[f"other gammas of {name}"] = f"one inverse and its update take {seconds:.0f}s of CPU time"
        measure(rest)
    except (PluginError, NumericalError) as error:
        result.failed[name] = str(error)
    except KfacError as error:
        result.skipped[name] = str(error)
    result.quality += sorted(rows, key=lambda row: row.gamma)


def _dense(
    result: Inspection,
    samples: Samples,
    approximations: Mapping[str, Approximation],
    span: tuple[int, int] | None,
    say: Say,
) -> None:
    """Matrices of the chosen layers, or the reason why there are none."""
    subject, exact = result.subject, result.subject.exact
    if span is None:
        result.skipped["dense matrices"] = (
            f"no two adjacent layers have {_dense_limit(exact):,} parameters or fewer together; name some with --layers"
        )
        return
    say(f"dense matrices of layers {span[0]} to {span[1]}")
    first, last = span[0] - 1, span[1]
    pairs = None
    if exact.pairs is not None:
        pairs = [(i - first, j - first) for i, j in exact.pairs if first <= i and j < last]
    try:
        result.dense = dense_report(
            exact.layers[first:last],
            samples[first:last],
            approximations,
            subject.gamma,
            pi=subject.pi,
            first=span[0],
            pairs=pairs,
            fisher=None if exact.plain else exact.fisher_matrix(first, last),
            damping=exact.damping,
        )
    except KfacError as error:
        result.skipped["dense matrices"] = str(error)
        return
    if not result.statistics.startswith("exact"):
        result.dense.cumulants = None  # the identity is one of expectations, not of a few draws
        result.dense.refused.setdefault("cumulants", f"they are expectations, and these are {result.statistics}")


def stretch(
    layers: Sequence[Block], limit: int = DENSE_LIMIT, kinds: Sequence[int | None] | None = None
) -> tuple[int, int] | None:
    """The longest run of at least two adjacent layers with no more than `limit` parameters, counted from 1.

    Args:
        layers: The layers.
        limit: Most parameters.
        kinds: Something that all layers of the run have in common, one a layer; None for layers that are left out.

    Returns:
        Of equally long ones the largest; None if there is none (a single layer shows nothing between layers).
    """
    best: tuple[int, int] | None = None
    score = (1, 0)
    for first in range(len(layers)):
        total = 0
        for last in range(first, len(layers)):
            total += layers[last].size
            if total > limit or (kinds is not None and (kinds[last] is None or kinds[last] != kinds[first])):
                break
            if (last - first + 1, total) > score and last > first:
                score, best = (last - first + 1, total), (first + 1, last + 1)
    return best


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _check_span(layers: tuple[int, int] | None, known: Sequence[Block]) -> None:
    if layers is None:
        return
    first, last = layers
    if not 1 <= first <= last <= len(known):
        raise ConfigError(f"--layers {first}-{last}: the model has layers 1 to {len(known)}")
    total = sum(layer.size for layer in known[first - 1 : last])
    if total > 4 * DENSE_LIMIT:
        raise ConfigError(
            f"--layers {first}-{last} have {total:,} parameters; a dense matrix is built for up to "
            f"{4 * DENSE_LIMIT:,}, name fewer layers"
        )


def _span(layers: tuple[int, int] | None, exact: ExactModel, samples: Samples) -> tuple[int, int] | None:
    """The layers of the dense matrices: those given, else a run with an F-tilde, else any run."""
    if layers is not None:
        return layers
    rows = [
        None if s is None or not layer.plain else s.gradients.shape[1]
        for layer, s in zip(exact.layers, samples, strict=True)
    ]
    limit = _dense_limit(exact)
    return stretch(exact.layers, limit, rows) or stretch(exact.layers, limit)


def _dense_limit(exact: ExactModel) -> int:
    """Matrices that are made of samples are cheap; others cost a product with the exact Fisher for each parameter."""
    return DENSE_LIMIT if exact.plain else _PRODUCTS


def _statistics(subject: Subject) -> tuple[Samples, str]:
    """The exact expectation where there is one and it fits in memory, else targets drawn from the model."""
    exact: ExactModel = subject.exact
    if exact.plain:
        entries = exact.cases * sum(layer.d_out for layer in exact.layers)
    else:
        once = exact.monte_carlo_samples(subject.generator("targets"))
        entries = sum(s.gradients.numel() for s in once if s is not None)
    if not exact.mixes and exact.passes * entries <= _EXACT_ENTRIES and exact.passes <= _MOST_PASSES:
        return exact.exact_samples(), "exact expectation over the model's targets"
    draws = max(1, min(_MOST_DRAWS, _DRAWN_ENTRIES // entries))
    samples = exact.monte_carlo_samples(subject.generator("targets"), draws)
    why = ", because the examples of a batch depend on each other" if exact.mixes else ""
    return samples, f"drawn targets, {draws} an example{why}"


def _natural(
    subject: Subject, registry: Registry, gradient: list[Tensor], samples: Samples, *, large: bool
) -> NaturalGradient:
    """Conjugate gradients, helped by the block-diagonal inverse where there is one."""
    exact = subject.exact
    helper = None
    if any(component.name == "blockdiag" for component in registry.components("approx")):
        approx = registry.build("approx", "blockdiag")
        # gamma near the damping of B: then the helper is close to B^-1 whatever gamma the run uses
        strength = max(exact.damping, 1e-8) ** 0.5
        try:
            [(_, helper)] = inverses(approx, exact.layers, samples, [strength], pi=subject.pi, pairs=exact.pairs)
        except KfacError:  # only slower without
            helper = None
    tolerance, most = _LARGE_SEARCH if large else _SEARCH
    return natural_gradient(exact, gradient, preconditioner=helper, tolerance=tolerance, max_iterations=most)
