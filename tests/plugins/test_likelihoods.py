"""The likelihoods against autograd, their own samples, and what users hand in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfac_plugins.likelihoods import CategoricalConfig
from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.errors import ConfigError, DataError
from kfacore.roles import Likelihood

CASES, OUTPUTS = 6, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outputs(scale: float = 2.0) -> Tensor:
    return scale * torch.randn(CASES, OUTPUTS, dtype=torch.float64, generator=generator(1))


def targets(likelihood: Likelihood) -> Tensor:
    if isinstance(likelihood, Categorical):
        return torch.tensor([0, 3, 1, 2, 2, 0])
    return torch.rand(CASES, OUTPUTS, dtype=torch.float64, generator=generator(2))


@pytest.fixture(params=[Bernoulli, Categorical, Gaussian])
def likelihood(request: pytest.FixtureRequest) -> Likelihood:
    made: Likelihood = request.param()
    return made


def dense_metric(likelihood: Likelihood, z: Tensor) -> Tensor:
    """F_R of each case, from products with the unit vectors: (n, o, o)."""
    eye = torch.eye(z.shape[1], dtype=z.dtype)[:, None, :].expand(-1, len(z), -1)
    return likelihood.fisher_product(z, eye).movedim(0, -1)


def test_residual_is_gradient_of_nll(likelihood: Likelihood) -> None:
    z = outputs().requires_grad_()
    y = targets(likelihood)
    (gradient,) = torch.autograd.grad(likelihood.nll(z, y).sum(), z)
    torch.testing.assert_close(likelihood.residual(z.detach(), y), gradient, rtol=1e-12, atol=1e-14)


def test_nll_is_the_negative_log_probability() -> None:
    z, y = outputs(), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double().expand(CASES, -1)
    coins = torch.distributions.Bernoulli(logits=z)
    torch.testing.assert_close(Bernoulli().nll(z, y), -coins.log_prob(y).sum(1))
    classes = targets(Categorical())
    torch.testing.assert_close(
        Categorical().nll(z, classes), -torch.distributions.Categorical(logits=z).log_prob(classes)
    )
    constant = 0.5 * OUTPUTS * torch.log(torch.tensor(2.0 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(Gaussian().nll(z, y) + constant, -torch.distributions.Normal(z, 1.0).log_prob(y).sum(1))


def test_metric_is_hessian_of_nll(likelihood: Likelihood) -> None:
    z, y = outputs(), targets(likelihood)
    metric = dense_metric(likelihood, z)
    for case in range(CASES):
        hessian = torch.autograd.functional.hessian(
            lambda row, case=case: likelihood.nll(row[None], y[case : case + 1]).sum(), z[case]
        )
        torch.testing.assert_close(metric[case], hessian, rtol=1e-12, atol=1e-14)


def test_square_root_gives_the_metric(likelihood: Likelihood) -> None:
    z = outputs()
    b = likelihood.fisher_sqrt(z)
    assert b.shape[1:] == z.shape
    torch.testing.assert_close(torch.einsum("kni,knj->nij", b, b), dense_metric(likelihood, z), rtol=1e-12, atol=1e-14)


def test_product_keeps_leading_dimensions(likelihood: Likelihood) -> None:
    z = outputs()
    t = torch.randn(2, 3, *z.shape, dtype=z.dtype, generator=generator(3))
    product = likelihood.fisher_product(z, t)
    assert product.shape == t.shape
    expected = torch.einsum("nij,abnj->abni", dense_metric(likelihood, z), t)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-13)


def test_sampled_residuals_average_to_the_metric(likelihood: Likelihood) -> None:
    """The expectation of g g^T over the model's own targets is F_R, within 5 standard errors."""
    draws = 20_000
    z = outputs()[:1].expand(draws, -1)
    y = likelihood.sample(z, generator(4))
    g = likelihood.residual(z, y)
    products = torch.einsum("ni,nj->nij", g, g)
    error = products.std(0) / draws**0.5
    deviation = (products.mean(0) - dense_metric(likelihood, z[:1])[0]).abs()
    assert (deviation <= 5.0 * error + 1e-12).all()
    assert (g.mean(0).abs() <= 5.0 * g.std(0) / draws**0.5).all()


def test_bernoulli_sample_compares_the_mean_with_uniform_draws() -> None:
    z = outputs()
    u = torch.rand(z.shape, generator=generator(5), dtype=z.dtype)
    sample = Bernoulli().sample(z, generator(5))
    assert sample.dtype == z.dtype
    assert torch.equal(sample, (z.sigmoid() >= u).double())


def test_categorical_frequencies() -> None:
    draws = 20_000
    z = torch.tensor([[0.0, -1e4, 1.0, 2.0]], dtype=torch.float64)
    p = z.softmax(1)[0]
    labels = Categorical().sample(z.expand(draws, -1), generator(6))
    assert labels.shape == (draws,)
    assert labels.dtype == torch.int64
    shares = torch.bincount(labels, minlength=4) / draws
    assert shares[1] == 0.0  # probability 0 is never drawn
    assert ((shares - p).abs() <= 5.0 * (p * (1 - p) / draws).sqrt() + 1e-12).all()


def test_categorical_sample_stays_in_range_for_extreme_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.tensor([[-1e4, 0.0, 0.0, -1e4]], dtype=torch.float32)
    for u, expected in ((0.0, 1), (1.0 - 2.0**-24, 2)):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **_: torch.full(shape, u))
        assert int(Categorical().sample(z)) == expected


def test_sampling_repeats_from_the_same_seed(likelihood: Likelihood) -> None:
    z = outputs()
    first, second, other = (likelihood.sample(z, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_outputs_stay_finite(likelihood: Likelihood, dtype: torch.dtype) -> None:
    z = torch.tensor([[1e4, -1e4, 1e4, -1e4], [0.0, 1e4, -1e4, 0.0]], dtype=dtype)
    y = torch.tensor([1, 2]) if isinstance(likelihood, Categorical) else torch.tensor([[0.0, 1, 1, 0]] * 2, dtype=dtype)
    t = torch.ones_like(z)
    for values in (
        likelihood.nll(z, y),
        likelihood.mean(z),
        likelihood.residual(z, y),
        likelihood.fisher_product(z, t),
        likelihood.fisher_sqrt(z),
        likelihood.error(z, y),
    ):
        assert values.isfinite().all()
        assert values.dtype == dtype


def test_stable_values_are_right_not_only_finite() -> None:
    z = torch.tensor([[1e4], [-1e4]], dtype=torch.float64)
    assert Bernoulli().nll(z, torch.tensor([[0.0], [1.0]])).tolist() == [1e4, 1e4]
    assert Bernoulli().nll(z, torch.tensor([[1.0], [0.0]])).tolist() == [0.0, 0.0]
    assert Categorical().nll(torch.tensor([[1e4, -1e4]]), torch.tensor([1])).tolist() == [2e4]
    # p (1 - p) in float32 would be 0 here
    z = torch.tensor([[30.0]])
    assert float(Bernoulli().fisher_product(z, torch.ones(1, 1))) == pytest.approx(9.36e-14, rel=1e-3)


def test_errors_reported_to_people() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    assert Bernoulli().error(z[:1], torch.tensor([[1.0, 0.0]])).tolist() == [0.5]
    assert Gaussian().error(z, torch.tensor([[1.0, 2.0], [2.0, -1.0]])).tolist() == [5.0, 0.0]
    assert Categorical().error(z, torch.tensor([1, 0])).tolist() == [1.0, 0.0]


def test_categorical_takes_small_integers() -> None:
    z, y = outputs(), targets(Categorical())
    assert torch.equal(Categorical().nll(z, y.to(torch.uint8)), Categorical().nll(z, y))
    assert torch.equal(Categorical().residual(z, y.int()), Categorical().residual(z, y))


MATRIX = torch.full((3, 4), 0.5)
WRONG: list[tuple[Callable[[], Likelihood], Tensor, str]] = [
    (Bernoulli, torch.full((3, 5), 0.5), r"\(N, 4\).*found \(3, 5\)"),
    (Bernoulli, torch.tensor([0, 1, 2]), r"found \(3,\).*categorical"),
    (Bernoulli, MATRIX.int(), "floating-point targets, found int32"),
    (Bernoulli, MATRIX * torch.tensor([1, 1, float("nan"), 1]), "3 of 3 examples hold NaN.*example 0"),
    (Bernoulli, MATRIX + torch.tensor([[0.0], [0.0], [0.6]]), r"\[0, 1\], found 0.5 to 1.1.*255"),
    (Bernoulli, -MATRIX, "found -0.5 to -0.5"),
    (Gaussian, torch.full((3, 5), 0.5), r"\(N, 4\).*found \(3, 5\)"),
    (Gaussian, MATRIX.long(), "found int64"),
    (Gaussian, torch.cat([MATRIX[:2], torch.full((1, 4), torch.inf)]), "1 of 3 examples.*example 2"),
    (Categorical, MATRIX, r"shape \(N,\).*found \(3, 4\).*argmax"),
    (Categorical, torch.tensor([0.0, 1.0]), "integer class numbers, found float32.*long"),
    (Categorical, torch.tensor([True, False]), "found bool"),
    (Categorical, torch.tensor([0, 4, 4]), r"0\.\.3 .*found 4 at example 1 and 2 such examples"),
    (Categorical, torch.tensor([0, 1, -1]), "found -1 at example 2"),
]


@pytest.mark.parametrize(("made", "y", "message"), WRONG)
def test_wrong_targets_are_refused_by_name(made: Callable[[], Likelihood], y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=rf"^y_train of data\.npz: .*{message}"):
        made().check_targets(y, 4, "y_train of data.npz")


def test_right_targets_pass(likelihood: Likelihood) -> None:
    likelihood.check_targets(targets(likelihood), OUTPUTS, "y")
    likelihood.check_targets(targets(likelihood)[:0], OUTPUTS, "y")


def test_bounds_belong_to_the_range() -> None:
    Bernoulli().check_targets(torch.tensor([[0.0, 1.0]]), 2, "y")
    Categorical().check_targets(torch.tensor([0, 1]), 2, "y")


def test_wrong_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="BernoulliConfig"):
        Bernoulli(CategoricalConfig())
