"""More planted errors: in moments of an approximation's own, and in manifests.

Each fails its suite with a message that points at the cause, and the same test passes without the error.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_plugins.approx.diagonal import Diagonal, DiagonalFactorisation, DiagonalInverse, DiagonalMoment
from kfac_plugins.approx.exact import DenseMoment, Exact, ExactFactorisation
from kfacore.plugin import PiRule
from kfacore.roles import LayerSamples
from kfacore.schema.slots import ApproxConfig
from kfacore.testing import ApproxCase, ApproxSuite

Approx = type[Diagonal] | type[Exact]


def failing(call: Callable[..., None], message: str, **arguments: Any) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        call(**arguments)


# --- approximations with moments of their own ----------------------------------------------------------------------


class PassMean(DiagonalMoment):
    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        changed = [LayerSamples(s.inputs, s.gradients / len(s.gradients) ** 0.5) for s in samples]
        super().accumulate(values, changed, beta, alpha)


class CaseSum(DiagonalMoment):
    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        changed = [LayerSamples(s.inputs, s.gradients * s.cases**0.5) for s in samples]
        super().accumulate(values, changed, beta, alpha)


class LastBatch(DiagonalMoment):
    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        super().accumulate(values, samples, [0.0] * len(values), [1 / s.cases for s in samples])


class Hidden(DiagonalMoment):
    """Keeps its average where no checkpoint finds it."""

    def __init__(self, layers: Any, like: Tensor, pairs: Any) -> None:
        super().__init__(layers, like, pairs)
        self.own = DiagonalMoment(layers, like, pairs)

    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        self.own.accumulate(self.own.values, samples, beta, alpha)
        self.values = [value.clone() for value in self.own.values]


class Tied(DiagonalMoment):
    """Goes on averaging in the tensors of the inverse that was taken up."""

    def refreshed(self, inverse: Any) -> None:
        self.values = list(inverse._curvature)


class Double(DiagonalMoment):
    def __init__(self, layers: Any, like: Tensor, pairs: Any) -> None:
        super().__init__(layers, like.double(), pairs)

    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        changed = [LayerSamples(s.inputs.double(), s.gradients.double()) for s in samples]
        super().accumulate(values, changed, beta, alpha)


class RowsStacked(DenseMoment):
    def accumulate(self, values: Any, samples: Any, beta: Any, alpha: Any) -> None:
        (value,) = values
        rows = torch.cat([torch.einsum("ni,no->noi", s.inputs, s.gradients[0]).flatten(1) for s in samples], 1)
        value.addmm_(rows.T, rows, beta=beta[0], alpha=alpha[0])


def with_moment(moment: type[DiagonalMoment]) -> type[Diagonal]:
    class Mutant(Diagonal):
        moments = (moment,)

        def factorise(self, moments: Any) -> Any:
            return DiagonalFactorisation(moments.layers, moments.snapshot(moment))

    return Mutant


class Unsquared(Diagonal):
    def factorise(self, moments: Any) -> Any:
        made = super().factorise(moments)
        return SimpleNamespace(damped=lambda gamma, pi="layer": made.damped(gamma.sqrt(), pi=pi))


class Hopeful(Diagonal):
    """Takes NaN for 0."""

    def factorise(self, moments: Any) -> Any:
        return DiagonalFactorisation(moments.layers, [d.nan_to_num(0.0) for d in moments[DiagonalMoment]])


class Transposing(Diagonal):
    def factorise(self, moments: Any) -> Any:
        class Inverse(DiagonalInverse):
            def solve(self, blocks: Any) -> Any:
                return [block.T for block in super().solve(blocks)]

        def damped(gamma: Tensor, *, pi: PiRule = "layer") -> Any:
            made = super(Transposing, self).factorise(moments).damped(gamma)
            return Inverse(made.layers, made._curvature)

        return SimpleNamespace(damped=damped)


class Uncoupled(Exact):
    """Forgets the blocks between layers."""

    def factorise(self, moments: Any) -> Any:
        (F,) = moments[DenseMoment]
        blocks, start = [], 0
        for layer in moments.layers:
            blocks.append(F[start : start + layer.size, start : start + layer.size])
            start += layer.size
        return ExactFactorisation(moments.layers, torch.block_diag(*blocks))


class Stacking(Exact):
    moments = (RowsStacked,)

    def factorise(self, moments: Any) -> Any:
        return ExactFactorisation(moments.layers, moments[RowsStacked][0].clone())


class Lopsided(Exact):
    def factorise(self, moments: Any) -> Any:
        (F,) = moments[DenseMoment]
        made = ExactFactorisation(moments.layers, F.clone()).damped

        def damped(gamma: Tensor, *, pi: PiRule = "layer") -> Any:
            inverse = made(gamma)
            inverse._matrix.inverse.triu_()
            return inverse

        return SimpleNamespace(damped=damped)


class Downhill(Exact):
    """The wrong sign of the damping: negative curvature where the Fisher has none."""

    def factorise(self, moments: Any) -> Any:
        (F,) = moments[DenseMoment]

        def damped(gamma: Tensor, *, pi: PiRule = "layer") -> Any:
            inverse = ExactFactorisation(moments.layers, F.clone()).damped(gamma)
            inverse._matrix.inverse.copy_(torch.linalg.inv(F - gamma.square() * torch.eye(len(F), dtype=F.dtype)))
            return inverse

        return SimpleNamespace(damped=damped)


def diagonal_reference(self: Any, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
    return torch.diag(case.per_case().square().sum(0) + gamma**2)


def exact_reference(self: Any, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
    rows = case.per_case()
    return rows.T @ rows + gamma**2 * torch.eye(case.size, dtype=rows.dtype)


def approx_suite(part: Approx) -> Any:
    reference = exact_reference if issubclass(part, Exact) else diagonal_reference

    def build(self: Any, **options: Any) -> Any:
        return part(part.Config.model_validate(options))

    return type("Suite", (ApproxSuite,), {"name": part.Config().kind, "build": build, "fisher": reference})()


DENSE = "test_multiply_is_the_dense_matrix"
NARROW = {"shape": "narrowing", "pi": "layer"}

APPROXIMATIONS: dict[str, tuple[Approx, str, dict[str, Any], str]] = {
    "mean over passes": (
        with_moment(PassMean),
        DENSE,
        {"shape": "one layer, several passes", "pi": "layer"},
        r"agrees with passes that are averaged: second moments are summed over passes",
    ),
    "sum over cases": (with_moment(CaseSum), DENSE, NARROW, r"agrees with a sum over cases: second moments are means"),
    "no average": (with_moment(LastBatch), DENSE, NARROW, r"agrees with the last mini-batch alone: no running average"),
    "state that is not saved": (
        with_moment(Hidden),
        "test_trains_a_small_net",
        {"dtype": torch.float64},
        r"resumed run takes another path: something is missing from .* the values of a moment",
    ),
    "tied to the inverse": (
        with_moment(Tied),
        "test_taking_an_inverse_up_does_not_tie_it_to_the_moments",
        {},
        r"inverse 1 solves differently since it was taken up .*must copy what `accumulate` writes to",
    ),
    "moment in double precision": (
        with_moment(Double),
        "test_dtype_and_device_are_kept",
        {"dtype": torch.float32, "device": "cpu"},
        r"solve returns torch\.float64 for layer0, the blocks are torch\.float32",
    ),
    "gamma, not its square": (Unsquared, DENSE, NARROW, r"where gamma\^2 belongs, gamma was added"),
    "gamma, not its square, in the limit": (
        Unsquared,
        "test_large_gamma_is_plain_gradient_descent",
        {},
        r"is not I / gamma\^2 .*damping must add gamma\^2 to a block in all",
    ),
    "NaN taken for 0": (
        Hopeful,
        "test_statistics_that_are_not_finite_are_named",
        {},
        r"statistics with a NaN gave an inverse; check the result and raise NumericalError",
    ),
    "transposed blocks": (
        Transposing,
        "test_dtype_and_device_are_kept",
        {"dtype": torch.float64, "device": "cpu"},
        r"solve returns shape \(5, 3\) for layer0, whose block is \(3, 5\)",
    ),
    "layers not coupled": (
        Uncoupled,
        DENSE,
        NARROW,
        r"largest difference is in block \(layer0, layer1\)|\(layer1, layer0",
    ),
    "rows stacked": (
        Stacking,
        DENSE,
        NARROW,
        r"agrees with moments of blocks whose rows are stacked, not their columns",
    ),
    "not symmetric": (Lopsided, "test_symmetric", {}, r"matrix of solve is not symmetric .* misplaced transpose"),
    "not definite": (Downhill, "test_positive_definite", {}, r"has the eigenvalue -.*a Fisher with damping has none"),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_planted_errors_of_approximations(name: str) -> None:
    mutant, test, arguments, message = APPROXIMATIONS[name]
    failing(getattr(approx_suite(mutant), test), message, **arguments)
    sound = Exact if issubclass(mutant, Exact) else Diagonal
    getattr(approx_suite(sound), test)(**arguments)


# --- manifests --------------------------------------------------------------------------------------------------------


class HeavyConfig(ApproxConfig):
    """Its module is said to be one that imports torch."""

    __module__ = "kfacore.roles.approx"
    kind: str = "heavy"


class SilentConfig(ApproxConfig):
    kind: str = "silent"
    strength: float = 1.0


class ForgetfulConfig(ApproxConfig):
    kind: str = "forgetful"

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return {**super().model_dump(**options), "refresh_every": 7}


@pytest.mark.parametrize(
    ("config", "test", "message"),
    [
        (
            HeavyConfig,
            "test_manifest_imports_no_torch",
            r"importing kfacore\.roles\.approx, where .*HeavyConfig is, imp",
        ),
        (
            SilentConfig,
            "test_config_has_a_json_schema",
            r"options without help: strength; write a docstring below each",
        ),
        (ForgetfulConfig, "test_config_survives_being_saved", "comes back from JSON as another one"),
    ],
)
def test_planted_errors_of_manifests(config: type[ApproxConfig], test: str, message: str) -> None:
    members = {
        "name": "mutant",
        "component": property(lambda self: SimpleNamespace(config=config)),
        "make_config": lambda self, **options: config(**options),
    }
    failing(getattr(type("Suite", (ApproxSuite,), members)(), test), message)
