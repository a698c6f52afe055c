"""The conformance suite of likelihoods."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfacore.errors import DataError
from kfacore.optim.loss import Loss
from kfacore.roles.likelihood import Likelihood
from kfacore.testing.base import ComponentSuite, devices, differs, same

__all__ = ["LikelihoodSuite"]

Float = torch.float64
_WHERE = "y_train of data.npz"


class LikelihoodSuite(ComponentSuite):
    """Tests of a predictive distribution. Set `name` and define `targets`.

    Attributes:
        outputs: Number of outputs, o, in the tests.
        draws: Samples a case where expectations are compared.
    """

    slot = "likelihood"
    outputs: ClassVar[int] = 3
    draws: ClassVar[int] = 20_000

    @abstractmethod
    def targets(self, n: int, generator: torch.Generator) -> Tensor:
        """Random valid targets of n cases, floating-point ones in double precision."""

    def bad_targets(self) -> dict[str, Tensor]:
        """Targets of four cases that must be refused; more can be added."""
        return {"a column too many": torch.zeros(4, self.outputs + 1, dtype=Float), "no cases axis": torch.zeros(())}

    def natural(self, n: int = 5, seed: int = 0) -> Tensor:
        """Random natural parameters z, (n, o)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, self.outputs, generator=generator, dtype=Float)

    def some_targets(self, n: int = 5, seed: int = 1) -> Tensor:
        """Reproducible targets."""
        return self.targets(n, torch.Generator().manual_seed(seed))

    def test_nll_of_each_case(self) -> None:
        """(n,), and a case's value depends on that case alone."""
        likelihood: Likelihood = self.build()
        z, y = self.natural(), self.some_targets()
        nll = likelihood.nll(z, y)
        assert tuple(nll.shape) == (5,), f"nll must be one number a case, found shape {tuple(nll.shape)}"
        one = likelihood.nll(z[2:3], y[2:3])
        assert differs(one, nll[2:3]) < 1e-14, "the nll of a case changes with the other cases: no mean over cases here"

    def test_residual_is_the_derivative_of_nll(self) -> None:
        """Against autograd."""
        likelihood: Likelihood = self.build()
        z, y = self.natural().requires_grad_(), self.some_targets()
        (wanted,) = torch.autograd.grad(likelihood.nll(z, y).sum(), z)
        error = differs(likelihood.residual(z.detach(), y), wanted)
        assert error < 1e-12, f"residual is not d nll / d z (off by {error:.1e} relative)"

    def test_mean_and_metric_are_those_of_the_samples(self) -> None:
        """Means over draws lie within 5 standard errors: E[residual] = 0, E[residual residual^T] = F_R."""
        likelihood: Likelihood = self.build()
        z = self.natural(3)
        many = z.repeat_interleave(self.draws, 0)
        y = likelihood.sample(many, torch.Generator().manual_seed(0))
        r = likelihood.residual(many, y).view(3, self.draws, self.outputs)
        error = r.std(1) / self.draws**0.5
        assert bool((r.mean(1).abs() <= 5 * error + 1e-12).all()), (
            "the mean residual over samples is not 0: sample and nll are of different distributions"
        )
        outer = torch.einsum("cni,cnj->cnij", r, r)
        deviation = (outer.mean(1) - self.metric(likelihood, z)).abs()
        assert bool((deviation <= 5 * outer.std(1) / self.draws**0.5 + 1e-10).all()), (
            f"E[residual residual^T] over samples is not F_R (off by up to {float(deviation.max()):.1e}): "
            "fisher_product and sample do not belong together"
        )

    def test_fisher_sqrt_is_a_square_root(self) -> None:
        """Sum over k of b_k b_k^T = F_R."""
        likelihood: Likelihood = self.build()
        z = self.natural()
        b = likelihood.fisher_sqrt(z)
        assert b.dim() == 3, f"fisher_sqrt must return (k, n, o), found {tuple(b.shape)}"
        assert tuple(b.shape[1:]) == (5, self.outputs), f"fisher_sqrt must return (k, n, o), found {tuple(b.shape)}"
        error = differs(torch.einsum("kni,knj->nij", b, b), self.metric(likelihood, z))
        assert error < 1e-12, f"the sum of b_k b_k^T is not the matrix of fisher_product (off by {error:.1e} relative)"

    def test_metric_is_symmetric_and_semi_definite(self) -> None:
        """As a Fisher metric is."""
        F = self.metric(self.build(), self.natural())
        assert differs(F.mT, F) < 1e-12, "F_R is not symmetric"
        assert float(torch.linalg.eigvalsh(F).min()) > -1e-12, "F_R has a negative eigenvalue"

    def test_fisher_product_takes_leading_dimensions(self) -> None:
        """Several tangents a case, (k, n, o)."""
        likelihood: Likelihood = self.build()
        z, t = self.natural(), torch.stack([self.natural(seed=s) for s in range(4)])
        wanted = torch.stack([likelihood.fisher_product(z, each) for each in t])
        found = likelihood.fisher_product(z, t)
        assert found.shape == t.shape, f"fisher_product returns {tuple(found.shape)} for t {tuple(t.shape)}"
        assert differs(found, wanted) < 1e-14, "fisher_product mixes tangents of different leading indices"

    def test_samples_are_valid_and_reproducible(self) -> None:
        """Drawn from the generator that is given, and from it alone."""
        likelihood: Likelihood = self.build()
        z = self.natural(40)
        state = torch.get_rng_state()
        draws = [likelihood.sample(z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(state, torch.get_rng_state()), "sample used the global generator, not the one it was given"
        assert torch.equal(draws[0], draws[1]), "the same seed gives other samples"
        assert not torch.equal(draws[0], draws[2]), "another seed gives the same samples"
        likelihood.check_targets(draws[0], self.outputs, "samples")
        assert tuple(likelihood.residual(z, draws[0]).shape) == tuple(z.shape)

    def test_stable_far_out(self) -> None:
        """Finite for natural parameters of any sensible size."""
        likelihood: Likelihood = self.build()
        for dtype in (torch.float32, Float):
            for size in (0.0, 30.0, -30.0, 1e3, -1e3):
                z = torch.full((4, self.outputs), size, dtype=dtype)
                z[:, 0] = -size
                y = self._cast(self.some_targets(4), dtype)
                parts = {
                    "nll": likelihood.nll(z, y),
                    "residual": likelihood.residual(z, y),
                    "mean": likelihood.mean(z),
                    "fisher_product": likelihood.fisher_product(z, torch.ones_like(z)),
                    "fisher_sqrt": likelihood.fisher_sqrt(z),
                    "error": likelihood.error(z, y),
                }
                for what, value in parts.items():
                    assert bool(torch.isfinite(value).all()), f"{what} is not finite at |z| = {abs(size):g} in {dtype}"

    @pytest.mark.parametrize("device", devices())
    @pytest.mark.parametrize("dtype", [torch.float32, Float], ids=str)
    def test_dtype_and_device_are_kept(self, dtype: torch.dtype, device: str) -> None:
        """As those of z, also for a batch of one."""
        likelihood: Likelihood = self.build()
        for n in (1, 5):
            z = self.natural(n).to(device, dtype)
            y = self._cast(self.some_targets(n), dtype).to(device)
            sample = likelihood.sample(z, torch.Generator(device).manual_seed(0))
            found = {
                "nll": likelihood.nll(z, y),
                "mean": likelihood.mean(z),
                "residual": likelihood.residual(z, sample),
                "fisher_product": likelihood.fisher_product(z, z),
                "fisher_sqrt": likelihood.fisher_sqrt(z),
                "error": likelihood.error(z, y),
            }
            for what, value in found.items():
                assert value.dtype == dtype, f"{what} is {value.dtype} for z in {dtype}"
                assert value.device.type == device, f"{what} is on {value.device} for z on {device}"

    def test_error_of_each_case(self) -> None:
        """(n,), not negative."""
        error = self.build().error(self.natural(), self.some_targets())
        assert tuple(error.shape) == (5,), f"error must be one number a case, found shape {tuple(error.shape)}"
        assert bool((error >= 0).all()), "an error below 0"

    def test_good_targets_pass_and_bad_ones_are_named(self) -> None:
        """DataError that says where."""
        likelihood: Likelihood = self.build()
        likelihood.check_targets(self.some_targets(50), self.outputs, "y_train")
        for what, bad in self.bad_targets().items():
            refusal = _refusal(likelihood, bad, self.outputs)
            assert refusal is not None, f"targets with {what} were not refused"
            assert _WHERE in refusal, f"the message does not say where the targets are from: {refusal}"

    def test_wrong_rows_are_known_without_waiting(self) -> None:
        """`unfit` finds in every mini-batch what `check_targets` refuses in the first one."""
        likelihood: Likelihood = self.build()
        good = self.some_targets(50)
        found = likelihood.unfit(good, self.outputs)
        assert found.dtype == torch.bool, f"unfit must say true or false of each row, found {found.dtype}"
        assert tuple(found.shape) == (50,), f"unfit must say one thing a row, found shape {tuple(found.shape)}"
        assert not bool(found.any()), "unfit finds fault with right targets"
        for what, bad in self.bad_targets().items():
            alike = bad.shape[1:] == good.shape[1:] and bad.is_floating_point() == good.is_floating_point()
            if bad.dim() and alike:
                assert bool(likelihood.unfit(bad, self.outputs).any()), f"unfit overlooks targets with {what}"

    def test_terms_are_a_weight_times_the_nll(self) -> None:
        """What options make of targets: weight, target and share have one row a target, and the target can be taken."""
        likelihood: Likelihood = self.build()
        z, y = self.natural(), self.some_targets()
        terms = likelihood.terms(y, self.outputs, z)
        nll, residual = likelihood.nll(z, terms.target), likelihood.residual(z, terms.target)
        assert tuple(nll.shape) == (5,), "nll does not take the target of terms"
        assert residual.shape == z.shape, "residual does not take the target of terms"
        for what, values in (("weight", terms.weight), ("share", terms.share)):
            if values is not None:
                assert values.shape[:1] == (5,), f"{what} must have one row a target, found {tuple(values.shape)}"
                assert values.dtype == z.dtype, f"{what} must be in the dtype of z, found {values.dtype}"
                assert bool((values >= 0).all()), f"{what} must not be negative: the metric would not be one"
        if terms.counts is not None:
            assert tuple(terms.counts.shape) == (5,), "counts must say one thing a row"
            assert terms.counts.dtype == torch.bool, "counts must be true or false"
        assert likelihood.factor(self.outputs) > 0, "factor must be positive"

    def test_loss_is_its_own_derivative_with_positions_and_masks(self) -> None:
        """Bound to outputs (n, positions, o): zero where nothing counts, the gradient that of the value."""
        likelihood: Likelihood = self.build()
        z, y = self.natural(12).view(4, 3, -1), self.some_targets(12)
        y = y.view(4, 3, *y.shape[1:])
        valid = torch.ones(4, 3, dtype=torch.bool)
        valid[0, 1] = valid[3] = False
        bound = Loss(likelihood).bind([z], y, valid)
        point = z.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(bound.value([point])[0], point)
        (found,) = bound.residuals([z])
        assert differs(found, wanted) < 1e-12, "the gradient of the loss is not that of its value"
        assert not bool(found[~valid].any()), "positions that do not count have a gradient"
        assert not bool(bound.fisher_product(z, z[None])[0][~valid].any()), "positions that do not count have curvature"

    def test_arguments_are_left_alone(self) -> None:
        """Nothing is written in place."""
        likelihood: Likelihood = self.build()
        z, y = self.natural(), self.some_targets()
        likelihood.nll(z, y), likelihood.residual(z, y), likelihood.mean(z), likelihood.error(z, y)
        likelihood.fisher_sqrt(z), likelihood.fisher_product(z, z), likelihood.sample(z, torch.Generator())
        assert same([z, y], [self.natural(), self.some_targets()]), "z or y was changed in place"

    def metric(self, likelihood: Likelihood, z: Tensor) -> Tensor:
        """F_R of each case as `fisher_product` has it, (n, o, o)."""
        n, o = z.shape
        eye = torch.eye(o, dtype=z.dtype)[:, None, :].expand(o, n, o)
        return likelihood.fisher_product(z, eye).permute(1, 2, 0)

    @staticmethod
    def _cast(y: Tensor, dtype: torch.dtype) -> Any:
        return y.to(dtype) if y.is_floating_point() else y


def _refusal(likelihood: Likelihood, y: Tensor, outputs: int) -> str | None:
    """The message of the refusal, if the targets were refused."""
    try:
        likelihood.check_targets(y, outputs, _WHERE)
    except DataError as error:
        return str(error)
    return None
