"""Every built-in approximation, likelihood, estimator, damping and momentum passes its role's suite."""

from __future__ import annotations

from typing import Any, ClassVar

import dense
import torch
from torch import Tensor

from kfacore.plugin import PiRule
from kfacore.registry import get_registry
from kfacore.roles import Likelihood
from kfacore.testing import (
    ApproxCase,
    ApproxSuite,
    ComponentSuite,
    DampingSuite,
    EstimatorSuite,
    LikelihoodSuite,
    MomentumSuite,
    TrustSuite,
)


class TestBlockDiagonal(ApproxSuite):
    name = "blockdiag"

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        return torch.block_diag(*[torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))])


class TestBlockTridiagonal(ApproxSuite):
    name = "tridiag"

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        every = range(len(case.layers))
        factors = dense.Kronecker(
            [[case.input_factor(i, j) for j in every] for i in every],
            [[case.output_factor(i, j) for j in every] for i in every],
        )
        return torch.linalg.inv(dense.tridiagonal_inverse(factors.damped(gamma, pi=pi)))


class TestTruncatedToBlockDiagonal(TestBlockDiagonal):
    name = "tridiag"
    options: ClassVar[dict[str, Any]] = {"tolerance": 1.0}


class TestTemperedBlockDiagonal(ApproxSuite):
    name = "blockdiag"
    options: ClassVar[dict[str, Any]] = {"power": 0.7}

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        """gamma^2 (Ad (x) Gd / gamma^2)^p, block by block."""
        damped = [torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))]
        return torch.block_diag(*[gamma**2 * power_of(block / gamma**2, 0.7) for block in damped])


class TestTemperedBlockTridiagonal(ApproxSuite):
    name = "tridiag"
    options: ClassVar[dict[str, Any]] = {"power": 0.7}

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        """D^1/2 Fd^-1/2 F-hat Fd^-1/2 D^1/2: the chain of whitened layers, with the tempered blocks D."""
        plain = TestBlockTridiagonal().fisher(case, gamma, pi=pi)
        damped = [torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))]
        root = torch.block_diag(*[power_of(block / gamma**2, 0.5 * (0.7 - 1.0)) for block in damped])
        return root @ plain @ root


def power_of(M: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values**p) @ vectors.T


class TestDiagonalFisher(ApproxSuite):
    name = "diagonal"

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        rows = case.per_case()
        return torch.diag(rows.square().sum(0) + gamma**2)


class TestExactFisher(ApproxSuite):
    name = "exact"

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        rows = case.per_case()
        return rows.T @ rows + gamma**2 * torch.eye(case.size, dtype=rows.dtype)


class TestBernoulli(LikelihoodSuite):
    name = "bernoulli"

    def targets(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, self.outputs, generator=generator, dtype=torch.float64)

    def bad_targets(self) -> dict[str, Tensor]:
        high, broken = torch.zeros(4, self.outputs), torch.zeros(4, self.outputs)
        high[1, 1], broken[2, 0] = 1.5, torch.nan
        return {**super().bad_targets(), "a value above 1": high, "a value below 0": -high, "NaN": broken}


class TestCategorical(LikelihoodSuite):
    name = "categorical"

    def targets(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.outputs, (n,), generator=generator)

    def bad_targets(self) -> dict[str, Tensor]:
        return {**super().bad_targets(), "a class too many": torch.arange(4), "fractions": torch.full((4,), 0.5)}


class TestGaussian(LikelihoodSuite):
    name = "gaussian"

    def targets(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.outputs, generator=generator, dtype=torch.float64)

    def bad_targets(self) -> dict[str, Tensor]:
        return {**super().bad_targets(), "infinity": torch.full((4, self.outputs), torch.inf)}


class TestWeightedBernoulli(TestBernoulli):
    options: ClassVar = {"weight": [0.5, 2.0, 1.0], "pos_weight": [3.0], "mean_outputs": True, "scale": 2.0}


class TestWeightedCategorical(TestCategorical):
    options: ClassVar = {"weight": [0.5, 2.0, 1.0], "label_smoothing": 0.1, "ignore_index": -100, "per": "example"}


class TestSoftCategorical(LikelihoodSuite):
    name = "categorical"
    options: ClassVar = {"soft": True}

    def targets(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, self.outputs, generator=generator, dtype=torch.float64).softmax(1)

    def bad_targets(self) -> dict[str, Tensor]:
        return {**super().bad_targets(), "a sum of 2": torch.full((4, self.outputs), 2.0 / self.outputs)}


class TestGaussianOfAnotherVariance(TestGaussian):
    options: ClassVar = {"variance": 0.3}


class TestMonteCarlo(EstimatorSuite):
    name = "monte-carlo"


class TestExact(EstimatorSuite):
    name = "exact"


class TestEmpirical(EstimatorSuite):
    name = "empirical"

    def metric(self, likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
        r = likelihood.residual(z, y)
        return torch.einsum("ni,nj->nij", r, r)


class TestLevenbergMarquardt(DampingSuite):
    name = "levenberg-marquardt"


class TestFixedDamping(DampingSuite):
    name = "fixed"
    options: ClassVar[dict[str, Any]] = {"lambda0": 0.3}


class TestQuadraticModel(MomentumSuite):
    name = "quadratic-model"


class TestNoMomentum(MomentumSuite):
    name = "none"


class TestFixedMomentum(MomentumSuite):
    name = "fixed"
    options: ClassVar[dict[str, Any]] = {"lr": 0.3, "mu": 0.9}


class TestNoTrust(TrustSuite):
    name = "none"


class TestUndo(TrustSuite):
    name = "undo"


def test_no_built_in_is_left_out() -> None:
    suites = [value for value in globals().values() if isinstance(value, type) and issubclass(value, ComponentSuite)]
    tested = {(suite.slot, suite.name) for suite in suites if suite.__name__.startswith("Test")}
    slots = ("approx", "likelihood", "estimator", "damping", "momentum", "trust")
    built_in = {
        (slot, component.name)
        for slot in slots
        for component in get_registry().components(slot)
        if component.target.startswith("kfac_plugins.")
    }
    assert built_in <= tested
