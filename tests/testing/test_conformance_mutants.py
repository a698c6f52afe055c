"""The kit finds planted errors, and its message points at the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_plugins.approx.blockdiag import BlockDiagonal, BlockDiagonalInverse
from kfac_plugins.damping.levenberg_marquardt import LevenbergMarquardt
from kfac_plugins.estimators.empirical import Empirical
from kfac_plugins.estimators.monte_carlo import MonteCarlo
from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfac_plugins.momentum.quadratic_model import QuadraticModelMomentum
from kfacore.curvature.kronecker import damp
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.curvature.spd import Spd
from kfacore.plugin import PiRule
from kfacore.testing import ApproxCase, ApproxSuite, DampingSuite, EstimatorSuite, LikelihoodSuite, MomentumSuite


class Factorisation:
    """Block-diagonal, with a place for an error before and after damping."""

    def __init__(self, layers: Any, A: list[Tensor], G: list[Tensor], inverse: Any = BlockDiagonalInverse) -> None:
        self.layers, self.A, self.G, self.inverse = layers, A, G, inverse

    def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> Any:
        factors, *_, notices = damp(self.layers, self.A, self.G, gamma, pi=self.split(pi))
        return self.inverse(self.layers, self.change(factors), notices)

    def split(self, pi: PiRule) -> PiRule:
        return pi

    def change(self, factors: Any) -> Any:
        return factors


class Mutant(BlockDiagonal):
    def factorise(self, moments: Any) -> Any:
        return self.make(moments, moments.snapshot(InputFactor), moments.snapshot(OutputFactor))

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        return Factorisation(moments.layers, A, G)


class MissingPi(Mutant):
    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Wrong(Factorisation):
            def split(self, pi: PiRule) -> PiRule:
                return None

        return Wrong(moments.layers, A, G)


class AlwaysPi(Mutant):
    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Wrong(Factorisation):
            def split(self, pi: PiRule) -> PiRule:
                return "layer"

        return Wrong(moments.layers, A, G)


class OnePiOfEach(Mutant):
    """Takes "net" for "layer"."""

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Wrong(Factorisation):
            def split(self, pi: PiRule) -> PiRule:
                return "layer" if pi == "net" else pi

        return Wrong(moments.layers, A, G)


class UndampedFactor(Mutant):
    """A is not damped at all."""

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Wrong(Factorisation):
            def change(self, factors: Any) -> Any:
                factors.A[:] = [Spd(f.base, 0 * f.shift, torch.linalg.pinv(f.base)) for f in factors.A]
                return factors

        return Wrong(moments.layers, A, G)


class WrongTranspose(Mutant):
    """Half of the whitening of A: L^-1 in place of L^-T L^-1."""

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Wrong(Factorisation):
            def change(self, factors: Any) -> Any:
                factors.A[:] = [Spd(f.base, f.shift, torch.linalg.cholesky(f.inverse)) for f in factors.A]
                return factors

        return Wrong(moments.layers, A, G)


class Stale(Mutant):
    """Keeps the first factorisation of its life for ever, of the statistics as they were after one mini-batch."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.first: Any = None

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        self.first = self.first or super().make(moments, A, G)
        return self.first


class Aliasing(Mutant):
    """Keeps the moments themselves, which later updates change."""

    def factorise(self, moments: Any) -> Any:
        return self.make(moments, moments[InputFactor], moments[OutputFactor])


class WrongDtype(Mutant):
    """Returns double precision whatever the blocks are."""

    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        return Factorisation(moments.layers, [a.double() for a in A], [g.double() for g in G], DoubleInverse)


class DoubleInverse(BlockDiagonalInverse):
    def solve(self, blocks: Any) -> Any:
        return super().solve([v.double() for v in blocks])

    def multiply(self, blocks: Any) -> Any:
        return super().multiply([v.double() for v in blocks])


class InPlace(Mutant):
    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Inverse(BlockDiagonalInverse):
            def solve(self, blocks: Any) -> Any:
                return [v.copy_(u) for v, u in zip(blocks, super().solve(blocks), strict=True)]

        return Factorisation(moments.layers, A, G, Inverse)


class Forgetful(Mutant):
    """A restored inverse has lost its damping."""

    def load_inverse(self, state: Any, layers: Any) -> Any:
        inverse = super().load_inverse(state, layers)
        for f in (*inverse._factors.A, *inverse._factors.G):
            f.shift.zero_()
        return inverse


class Exchanged(Mutant):
    def make(self, moments: Any, A: list[Tensor], G: list[Tensor]) -> Any:
        class Inverse(BlockDiagonalInverse):
            solve = BlockDiagonalInverse.multiply
            multiply = BlockDiagonalInverse.solve

        return Factorisation(moments.layers, A, G, Inverse)


def suite_of(base: type, part: Callable[..., Any], **methods: Any) -> Any:
    """The suite of a part that is not registered."""
    found = type("Suite", (base,), {"name": "mutant", "build": lambda self, **options: part(), **methods})()
    return found


def fisher(self: Any, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
    return torch.block_diag(*[torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))])


APPROXIMATIONS: dict[str, tuple[type[Mutant], str, dict[str, Any], str]] = {
    "missing pi": (
        MissingPi,
        "test_multiply_is_the_dense_matrix",
        {"shape": "narrowing", "pi": "layer"},
        r"agrees with pi = None: gamma is split the wrong way",
    ),
    "pi always": (
        AlwaysPi,
        "test_solve_is_the_dense_inverse",
        {"shape": "narrowing", "pi": None},
        r"agrees with pi = 'layer': gamma is split the wrong way",
    ),
    "one pi of each": (
        OnePiOfEach,
        "test_multiply_is_the_dense_matrix",
        {"shape": "narrowing", "pi": "net"},
        r"agrees with pi = 'layer': gamma is split the wrong way",
    ),
    "undamped factor": (
        UndampedFactor,
        "test_large_gamma_is_plain_gradient_descent",
        {},
        r"pi gamma to one factor and gamma / pi to the other",
    ),
    "undamped factor, dense": (
        UndampedFactor,
        "test_multiply_is_the_dense_matrix",
        {"shape": "narrowing", "pi": "layer"},
        r"largest difference is in block \(layer",
    ),
    "wrong transpose": (WrongTranspose, "test_symmetric", {}, r"solve is not symmetric .* misplaced transpose"),
    "stale": (Stale, "test_later_statistics_do_not_show_through", {}, r"ignores the moments' last updates: a stale"),
    "aliasing": (Aliasing, "test_later_statistics_do_not_show_through", {}, r"copy what it keeps of them"),
    "wrong dtype": (
        WrongDtype,
        "test_dtype_and_device_are_kept",
        {"dtype": torch.float32, "device": "cpu"},
        r"solve returns torch\.float64 for layer0, the blocks are torch\.float32",
    ),
    "in place": (InPlace, "test_arguments_are_left_alone", {}, r"wrote into the blocks it was given"),
    "forgetful": (Forgetful, "test_state_round_trip", {"dtype": torch.float64}, r"restored inverse multiplies differ"),
    "exchanged": (
        Exchanged,
        "test_solve_is_the_dense_inverse",
        {"shape": "widening", "pi": "layer"},
        r"agrees with the inverse matrix: solve and multiply are exchanged",
    ),
}


def failing(call: Callable[..., None], message: str, **arguments: Any) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        call(**arguments)


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_planted_errors_of_approximations(name: str) -> None:
    mutant, test, arguments, message = APPROXIMATIONS[name]
    failing(getattr(suite_of(ApproxSuite, mutant, fisher=fisher), test), message, **arguments)


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_without_the_error_the_same_test_passes(name: str) -> None:
    _, test, arguments, _ = APPROXIMATIONS[name]
    getattr(suite_of(ApproxSuite, Mutant, fisher=fisher), test)(**arguments)


def test_a_reference_is_needed() -> None:
    with pytest.raises(NotImplementedError, match=r"must define fisher\(case, gamma, pi=\.\.\.\)"):
        suite_of(ApproxSuite, Mutant).test_multiply_is_the_dense_matrix(shape="narrowing", pi="layer")


def targets(self: Any, n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, self.outputs, generator=generator, dtype=torch.float64)


class WrongSign(Bernoulli):
    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return y - z.sigmoid()


class NoisySample(Gaussian):
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return z + 1.1 * torch.randn(z.shape, generator=generator, dtype=z.dtype)


class GlobalGenerator(Bernoulli):
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(z))


class Overflowing(Bernoulli):
    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        return ((1 + z.exp()).log() - y * z).sum(-1)


class Averaging(Bernoulli):
    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        return super().nll(z, y) / len(z)


class Trusting(Bernoulli):
    def check_targets(self, y: Tensor, outputs: int, where: str) -> None:
        return None


@pytest.mark.parametrize(
    ("mutant", "test", "message"),
    [
        (WrongSign, "test_residual_is_the_derivative_of_nll", "residual is not d nll / d z"),
        (NoisySample, "test_mean_and_metric_are_those_of_the_samples", "do not belong together"),
        (GlobalGenerator, "test_samples_are_valid_and_reproducible", "global generator"),
        (Overflowing, "test_stable_far_out", "nll is not finite at"),
        (Averaging, "test_nll_of_each_case", "no mean over cases here"),
        (Trusting, "test_good_targets_pass_and_bad_ones_are_named", "a column too many were not refused"),
    ],
)
def test_planted_errors_of_likelihoods(mutant: Any, test: str, message: str) -> None:
    failing(getattr(suite_of(LikelihoodSuite, mutant, targets=targets), test), message)


class Doubled(MonteCarlo):
    def output_vectors(self, *args: Any) -> Tensor:
        return 2**0.5 * super().output_vectors(*args)


class CaseMean(MonteCarlo):
    def output_vectors(self, z: Tensor, *args: Any) -> Tensor:
        return super().output_vectors(z, *args) / len(z)


@pytest.mark.parametrize(
    ("mutant", "test", "message"),
    [
        (Doubled, "test_expectation", "is not the metric it stands for"),
        (Empirical, "test_expectation", "which targets are sent back"),
        (CaseMean, "test_scale_does_not_depend_on_the_number_of_cases", "must not be averaged over cases"),
    ],
)
def test_planted_errors_of_estimators(mutant: Any, test: str, message: str) -> None:
    failing(getattr(suite_of(EstimatorSuite, mutant), test), message)


class UpsideDown(LevenbergMarquardt):
    def adapt(self, rho: Tensor) -> None:
        super().adapt(1.0 - rho)


class Rounding(LevenbergMarquardt):
    def adapt(self, rho: Tensor) -> None:
        super().adapt(rho)
        self.lam = self.lam.float().double()


class InPlaceLambda(LevenbergMarquardt):
    def adapt(self, rho: Tensor) -> None:
        self.lam.mul_(2.0)


@pytest.mark.parametrize(
    ("mutant", "test", "message"),
    [
        (UpsideDown, "test_a_better_model_never_raises_lambda", "upside down"),
        (Rounding, "test_adaptation_keeps_double_precision", "has single precision only"),
        (InPlaceLambda, "test_saved_state_is_a_value", "the saved lam changed"),
    ],
)
def test_planted_errors_of_damping(mutant: Any, test: str, message: str) -> None:
    failing(getattr(suite_of(DampingSuite, mutant), test), message)


class Uphill(QuadraticModelMomentum):
    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        return -super().coefficients(M, b)


class Secretive(QuadraticModelMomentum):
    uses_model = False


class Naive(QuadraticModelMomentum):
    def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
        d = M[:, 0, 0] * M[:, 1, 1] - M[:, 0, 1] ** 2
        alpha = (M[:, 0, 1] * b[:, 1] - M[:, 1, 1] * b[:, 0]) / d
        return torch.stack([alpha, (M[:, 0, 1] * b[:, 0] - M[:, 0, 0] * b[:, 1]) / d], 1)


@pytest.mark.parametrize(
    ("mutant", "test", "message"),
    [
        (Uphill, "test_steps_go_down_the_model", "check the signs of b"),
        (Secretive, "test_steps_go_down_the_model", "set uses_model = True"),
        (Naive, "test_degenerate_planes_stay_finite", "not finite for Delta"),
    ],
)
def test_planted_errors_of_momentum(mutant: Any, test: str, message: str) -> None:
    failing(getattr(suite_of(MomentumSuite, mutant), test), message)
