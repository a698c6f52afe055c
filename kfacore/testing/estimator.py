"""The conformance suite of statistics estimators."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from kfacore.network import Linearizer
from kfacore.registry import get_registry
from kfacore.roles.block import share_of
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.samples import LayerSamples
from kfacore.testing.base import ComponentSuite, devices, differs, same

__all__ = ["EstimatorSuite"]

_OUTPUTS = 3
Float = torch.float64


class EstimatorSuite(ComponentSuite):
    """Tests of an estimator. Set `name`; define `metric` if it stands for another metric than the Fisher's.

    Attributes:
        likelihoods: Names of the likelihoods it is tried with.
        draws: Copies of a case where expectations are compared.
    """

    slot = "estimator"
    likelihoods: ClassVar[tuple[str, ...]] = ("bernoulli", "categorical", "gaussian")
    draws: ClassVar[int] = 20_000

    def metric(self, likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
        """What v v^T, summed over passes, is on average for each case, (n, o, o); the Fisher metric by default."""
        n, o = z.shape
        eye = torch.eye(o, dtype=z.dtype)[:, None, :].expand(o, n, o)
        return likelihood.fisher_product(z, eye).permute(1, 2, 0)

    def test_expectation(self) -> None:
        """Means over many draws lie within 5 standard errors of `metric`."""
        for name in self.likelihoods:
            likelihood = _likelihood(name)
            z, y = _outputs(3), _targets(name, 3)
            many = z.repeat_interleave(self.draws, 0), y.repeat_interleave(self.draws, 0)
            v = self.build().output_vectors(*many, likelihood, torch.Generator().manual_seed(0))
            assert v.dim() == 3, f"output_vectors must be (passes, cases, outputs), found {tuple(v.shape)}"
            assert tuple(v.shape[1:]) == tuple(many[0].shape), (
                f"output_vectors must be (passes, cases, outputs), found {tuple(v.shape)} for z {tuple(many[0].shape)}"
            )
            v = v.reshape(v.shape[0], 3, self.draws, _OUTPUTS)
            outer = torch.einsum("kcni,kcnj->cnij", v, v)
            deviation = (outer.mean(1) - self.metric(likelihood, z, y)).abs()
            assert bool((deviation <= 5 * outer.std(1) / self.draws**0.5 + 1e-10).all()), (
                f"with {name} the mean of v v^T is not the metric it stands for (off by up to "
                f"{float(deviation.max()):.1e}): which targets are sent back, and is a factor of cases or passes left?"
            )

    def test_only_its_share_of_the_cases(self) -> None:
        """The first ceil(tau_1 m); whatever the others are."""
        for tau1 in (0.125, 0.5, 1.0):
            estimator: Estimator = self.build(tau1=tau1)
            n = estimator.cases(20)
            assert n == share_of(20, tau1), f"tau1 = {tau1}: {n} cases of 20, not ceil(tau_1 m) = {share_of(20, tau1)}"
            x, y = _inputs(20), _targets("gaussian", 20)
            first = self._collect(estimator, x, y)
            x, y = x.clone(), y.clone()
            x[n:], y[n:] = 7.0, -7.0
            again = self._collect(estimator, x, y)
            for a, b in zip(first, again, strict=True):
                assert a.cases == n, f"saw {a.cases} cases, not {n}"
                assert same([a.inputs, a.gradients], [b.inputs, b.gradients]), "cases beyond its share play a part"
        n = self.build(tau1=0.1, min_cases=15).cases(20, 3)
        assert n == 10, f"min_cases = 15 of cases with 3 positions each: {n}, not 10"

    def test_samples_of_each_layer(self) -> None:
        """Abar with its 1 and g of every pass, for each layer; also for a batch of one."""
        for m in (1, 20):
            for s, (d_in, d_out) in zip(
                self._collect(self.build(tau1=1.0), _inputs(m), _targets("gaussian", m)), ((5, 4), (5, 3)), strict=True
            ):
                assert tuple(s.inputs.shape) == (m, d_in), f"abar has shape {tuple(s.inputs.shape)}, not {(m, d_in)}"
                assert tuple(s.gradients.shape[1:]) == (m, d_out), f"g has shape {tuple(s.gradients.shape)}"
                assert bool((s.inputs[:, -1] == 1).all()), "abar does not end with the homogeneous 1"

    def test_draws_come_from_the_generator_alone(self) -> None:
        """Reproducible, and the global generator is left alone."""
        x, y = _inputs(20), _targets("gaussian", 20)
        state = torch.get_rng_state()
        runs = [self._collect(self.build(), x, y, seed=0) for _ in range(2)]
        assert torch.equal(state, torch.get_rng_state()), "it used the global generator, not the one it was given"
        assert all(torch.equal(a.gradients, b.gradients) for a, b in zip(*runs, strict=True)), (
            "the same seed gives other samples"
        )

    @pytest.mark.parametrize("device", devices())
    @pytest.mark.parametrize("dtype", [torch.float32, Float], ids=str)
    def test_dtype_and_device_are_kept(self, dtype: torch.dtype, device: str) -> None:
        """As those of z."""
        for name in self.likelihoods:
            y = _targets(name, 6)
            y = (y.to(dtype) if y.is_floating_point() else y).to(device)
            z, generator = _outputs(6).to(device, dtype), torch.Generator(device).manual_seed(0)
            v = self.build().output_vectors(z, y, _likelihood(name), generator)
            assert v.dtype == dtype, f"vectors are {v.dtype} for z in {dtype}"
            assert v.device.type == device, f"vectors are on {v.device} for z on {device}"

    def test_scale_does_not_depend_on_the_number_of_cases(self) -> None:
        """The same cases many times over give the same second moments."""
        likelihood, z = _likelihood("gaussian"), _outputs(4)
        y = _targets("gaussian", 4)
        scales = []
        for copies in (1000, 10_000):
            many = z.repeat(copies, 1), y.repeat(copies, 1)
            v = self.build().output_vectors(*many, likelihood, torch.Generator().manual_seed(0))
            scales.append((v.square().sum() / len(many[0])).reshape(1))
        assert differs(scales[0], scales[1]) < 0.1, (
            f"ten times the cases change the second moment per case from {float(scales[0]):.3g} to "
            f"{float(scales[1]):.3g}: vectors must not be averaged over cases"
        )

    def _collect(self, estimator: Estimator, x: Tensor, y: Tensor, seed: int = 0) -> list[LayerSamples]:
        batch = Linearizer(_model())(x, estimator.cases(len(x)))
        found = batch.samples(estimator, y, _likelihood("gaussian"), torch.Generator().manual_seed(seed))
        return [samples for samples in found if samples is not None]


def _likelihood(name: str) -> Likelihood:
    return get_registry().build("likelihood", name)


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):  # modules draw their first values from the global generator
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, _OUTPUTS)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=Float))
    return model


def _inputs(n: int) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=Float)


def _outputs(n: int) -> Tensor:
    return torch.randn(n, _OUTPUTS, generator=torch.Generator().manual_seed(2), dtype=Float)


def _targets(likelihood: str, n: int) -> Tensor:
    """Valid targets, drawn by the likelihood itself at other natural parameters."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(n, _OUTPUTS, generator=generator, dtype=Float)
    return _likelihood(likelihood).sample(z, generator)
