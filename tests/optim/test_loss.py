"""The loss against torch's own losses: value, gradient, and the Hessian, which is the Fisher for these likelihoods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.estimators.exact import Exact
from kfac_plugins.estimators.monte_carlo import MonteCarlo
from kfacore.errors import ConfigError, DataError
from kfacore.optim.bound_loss import BoundLoss
from kfacore.optim.drawing import Share
from kfacore.optim.loss import Loss
from kfacore.parallel.ranks import ALONE
from kfacore.parallel.whole import Whole, interleaved
from kfacore.roles import Likelihood

Float = torch.float64
CLASSES = 3


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=draws(seed), dtype=Float)


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=draws(1))


def ignoring(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[1] = -100
    return y


WEIGHT = torch.tensor([0.5, 2.0, 1.25], dtype=Float)
FLAT, SECOND = (5, CLASSES), (4, CLASSES, 2)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[tuple[int, ...]], Tensor]]] = {
    "ce": (nn.CrossEntropyLoss, FLAT, lambda s: labels(s[0])),
    "ce, some ignored": (nn.CrossEntropyLoss, FLAT, lambda s: ignoring(labels(s[0]))),
    "ce, positions": (nn.CrossEntropyLoss, SECOND, lambda s: ignoring(labels(s[0], s[2]))),
    "ce, images": (nn.CrossEntropyLoss, (2, CLASSES, 2, 2), lambda s: labels(s[0], *s[2:])),
    "ce, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), SECOND, lambda s: ignoring(labels(s[0], s[2]))),
    "ce, weight": (lambda: nn.CrossEntropyLoss(weight=WEIGHT), FLAT, lambda s: ignoring(labels(s[0]))),
    "ce, weight, sum": (lambda: nn.CrossEntropyLoss(WEIGHT, reduction="sum"), FLAT, lambda s: labels(s[0])),
    "ce, smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), SECOND, lambda s: labels(s[0], s[2])),
    "ce, weight and smoothing": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3),
        SECOND,
        lambda s: ignoring(labels(s[0], s[2])),
    ),
    "ce, all smoothed": (lambda: nn.CrossEntropyLoss(label_smoothing=1.0), FLAT, lambda s: labels(s[0])),
    "ce, soft": (nn.CrossEntropyLoss, SECOND, lambda s: normal(*s, seed=2).softmax(1)),
    "ce, soft, weight, smoothing": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        FLAT,
        lambda s: normal(*s, seed=2).softmax(1),
    ),
    "bce": (nn.BCEWithLogitsLoss, FLAT, lambda s: normal(*s, seed=3).sigmoid()),
    "bce, one output": (nn.BCEWithLogitsLoss, (5,), lambda s: (normal(*s, seed=3) > 0).double()),
    "bce, weights": (
        lambda: nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=2 * WEIGHT),
        FLAT,
        lambda s: normal(*s, seed=3).sigmoid(),
    ),
    "bce, positive ones left out": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.zeros(1)),
        FLAT,
        lambda s: (normal(*s, seed=3) > 0).double(),
    ),
    "bce, sum": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), (4, 2, 3), lambda s: normal(*s, seed=3).sigmoid()),
    "mse": (nn.MSELoss, FLAT, lambda s: normal(*s, seed=4)),
    "mse, images": (nn.MSELoss, (2, 3, 2, 2), lambda s: normal(*s, seed=4)),
    "mse, sum": (lambda: nn.MSELoss(reduction="sum"), FLAT, lambda s: normal(*s, seed=4)),
}


def dense(values: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """A linear map of tensors shaped as z as a matrix."""
    eye = torch.eye(like.numel(), dtype=Float).view(-1, *like.shape)
    return values(eye).reshape(like.numel(), like.numel())


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_metric_are_those_of_torch(name: str) -> None:
    make, shape, targets = CASES[name]
    z, y, criterion = normal(*shape, seed=5), targets(shape), make().double()
    bound = Loss.of(make()).bind([z[:1], z[1:]], y)

    point = z.clone().requires_grad_()
    value = criterion(point, y)
    (gradient,) = torch.autograd.grad(value, point)
    hessian = torch.autograd.functional.hessian(lambda at: criterion(at, y), z).reshape(z.numel(), z.numel())

    torch.testing.assert_close(bound.value([z[:1], z[1:]])[0], value.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat(bound.residuals([z[:1], z[1:]])), gradient, rtol=1e-12, atol=1e-14)
    metric = dense(lambda t: bound.fisher_product(z, t), z)
    torch.testing.assert_close(metric, hessian, rtol=1e-10, atol=1e-13)
    t = torch.stack([normal(*shape, seed=6), normal(*shape, seed=7)])
    gram = t.flatten(1) @ hessian @ t.flatten(1).T
    torch.testing.assert_close(bound.fisher_gram(z, t), gram, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_a_root_of_the_metric(name: str) -> None:
    """Sums over passes of v v^T of a case are S times the metric's block, of all cases and of the first ones."""
    make, shape, targets = CASES[name]
    z, y = normal(*shape, seed=5), targets(shape)
    bound = Loss.of(make()).bind([z], y)
    for n in (len(z), 2):
        first = z[:n]
        v = bound.statistics(first, Exact(), draws())
        v = v.reshape(*v.shape[:2], -1)
        metric = dense(lambda t, first=first: bound.fisher_product(first, t), first).view(n, v.shape[2], n, v.shape[2])
        found = torch.einsum("kni,knj->nij", v, v) / bound.total(n)
        torch.testing.assert_close(found, torch.stack([metric[i, :, i] for i in range(n)]), rtol=1e-10, atol=1e-13)


def test_too_many_passes_are_refused() -> None:
    z, y = torch.zeros(1, 5000, CLASSES), labels(1, 5000)
    with pytest.raises(ConfigError, match="'exact' needs 3 backward passes for each of 5000 positions"):
        Loss.of("categorical").bind([z], y).statistics(z, Exact(), draws())


def test_a_gaussian_with_a_variance() -> None:
    z, y = normal(4, 3), normal(4, 3, seed=1)
    for criterion in (nn.GaussianNLLLoss(), nn.GaussianNLLLoss(full=True, reduction="sum")):
        loss = Loss(Likelihood.of(criterion, variance=0.3))
        point = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(point, y, torch.full_like(y, 0.3)), point)
        torch.testing.assert_close(loss.bind([z], y).residuals([z])[0], gradient)  # its value is compared in `bind`


def test_the_class_second_layout_is_told_by_shapes_and_kept() -> None:
    y = labels(4, 2)
    z = normal(4, 2, CLASSES)
    loss = Loss.of("categorical")
    last = loss.bind([z], y).value([z])
    second = Loss.of("categorical").bind([z.mT], y).value([z.mT])
    assert float(last[0]) == pytest.approx(float(second[0]), rel=1e-14)
    square, many = normal(4, 3, 3), labels(4, 3)
    assert not Loss.of("categorical").bind([square], many).layout.second, "last where nothing tells it"
    assert Loss.of(nn.CrossEntropyLoss()).bind([square], many).layout.second, "as the loss of torch reads it"
    told = Loss.of(nn.CrossEntropyLoss())
    told.bind([z], y)
    assert not told.bind([square], many).layout.second, "an earlier mini-batch told it"
    with pytest.raises(DataError, match=r"outputs of shape \(4, 2, 3\) need class numbers of shape \(4, 2\)"):
        loss.bind([z], labels(4, 5))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("per", ["example", "position", None])
def test_a_mask_leaves_out_positions(likelihood: str, per: str | None) -> None:
    """As if they were not there: value, gradient, statistics; whatever the model says there."""
    z = normal(4, 2, CLASSES)
    y = labels(4, 2) if likelihood == "categorical" else normal(4, 2, CLASSES, seed=1).sigmoid()
    valid = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    z = torch.where(valid.bool()[..., None], z, torch.nan)
    bound = Loss.of({"kind": likelihood, "per": per}).bind([z[:2], z[2:]], y, valid)
    token_mean = (per or ("position" if likelihood == "categorical" else "example")) == "position"
    assert int(bound.total()) == (4 if token_mean else 3)
    rows, kept = z[valid.bool()], y[valid.bool()]
    alone = Loss.of(likelihood)
    want = alone.likelihood.nll(rows, kept).sum() / (4 if token_mean else 3)
    torch.testing.assert_close(bound.value([z[:2], z[2:]])[0], want)
    residuals = torch.cat(bound.residuals([z[:2], z[2:]]))
    torch.testing.assert_close(residuals[valid.bool()] * bound.total(), alone.likelihood.residual(rows, kept))
    t = torch.stack([z, z])
    for found in (residuals, bound.statistics(z, Exact(), draws()), bound.fisher_product(z, t)):
        assert bool(found.isfinite().all())
        assert bool((found[..., ~valid.bool(), :] == 0).all())
    assert bool(bound.fisher_gram(z, t).isfinite().all())
    assert bound.valid is not None
    assert torch.equal(bound.valid, valid.bool())


def test_a_mask_of_examples_and_wrong_masks() -> None:
    z, y = normal(4, 2, CLASSES), labels(4, 2)
    whole = torch.tensor([True, False, True, True])
    assert int(Loss.of("categorical").bind([z], y, whole).total()) == 6
    loss = Loss.of("categorical")
    for mask, message in (
        (torch.ones(4, 2, 1), "found float32"),
        (torch.ones(3, 2).bool(), "3 rows of the mask for 4 examples"),
        ([1, 1], "found a list"),
        (torch.ones(4, 5).bool(), r"a mask of shape \(4, 5\)"),
    ):
        with pytest.raises(DataError, match=message):
            loss.bind([z], y, mask)
    with pytest.raises(DataError, match="no position of the mini-batch counts"):
        loss.bind([z], y, torch.zeros(4, 2).bool())
    with pytest.raises(DataError, match="no position of the mini-batch counts"):
        Loss.of(nn.CrossEntropyLoss()).bind([normal(2, 3)], torch.full((2,), -100))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_draws_belong_to_the_place_in_the_whole_batch(likelihood: str) -> None:
    """Parts of a mini-batch on several processes get the targets that one process would draw."""
    z = normal(5, 2, CLASSES)
    y = labels(5, 2) if likelihood == "categorical" else normal(5, 2, CLASSES, seed=1).sigmoid()
    loss = Loss.of(likelihood)
    after = draws()
    want = loss.bind([z], y).statistics(z, MonteCarlo(), after)
    for rank, places in enumerate(interleaved((2, 3))):
        own, generator = loss.bind([z[places]], y[places]), draws()
        found = own.statistics(z[places], MonteCarlo(), generator, part=Share(Whole((2, 3), rank), 5, ALONE))
        assert torch.equal(found, want[:, places])
        assert torch.equal(generator.get_state(), after.get_state())


def test_loss_of_parts_is_divided_by_what_counts_in_the_whole() -> None:
    z, y = normal(6, 2, CLASSES), labels(6, 2)
    valid = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1], [0, 0], [0, 0]]).bool()
    loss, whole = Loss.of("categorical"), Whole((4, 2), 0)
    loss.shared = True
    want = loss.bind([z], y, valid)
    parts = [loss.bind([z[a:b]], y[a:b], valid[a:b]).part_of(whole.cases) for a, b in ((0, 4), (4, 6))]
    total = [sum(pair) for pair in zip(*(part.numbers(part.cases) for part in parts), strict=True)]
    shares = [part.with_numbers(total) for part in parts]
    values = [share.value([z[a:b]]) for share, (a, b) in zip(shares, ((0, 4), (4, 6)), strict=True)]
    assert float(values[0][0] + values[1][0]) == pytest.approx(float(want.value([z])[0]), rel=1e-14)
    assert float(values[0][1] + values[1][1]) == pytest.approx(float(want.value([z])[1]), rel=1e-14)
    gradients = [share.residuals([z[a:b]])[0] for share, (a, b) in zip(shares, ((0, 4), (4, 6)), strict=True)]
    torch.testing.assert_close(torch.cat(gradients), want.residuals([z])[0])


def test_scale_goes_everywhere() -> None:
    z, y = normal(4, CLASSES), labels(4)
    one, nine = (Loss.of({"kind": "categorical", "scale": c}).bind([z], y) for c in (1.0, 9.0))
    assert float(nine.value([z])[0]) == pytest.approx(9 * float(one.value([z])[0]))
    torch.testing.assert_close(nine.residuals([z])[0], 9 * one.residuals([z])[0])
    torch.testing.assert_close(nine.statistics(z, Exact(), draws()), 3 * one.statistics(z, Exact(), draws()))
    torch.testing.assert_close(nine.fisher_gram(z, z[None]), 9 * one.fisher_gram(z, z[None]))
    assert float(nine.value([z])[1]) == float(one.value([z])[1])


def test_plain_losses_are_the_means_over_cases_bit_for_bit() -> None:
    z, y = normal(5, CLASSES).float(), labels(5)
    bound: BoundLoss = Loss.of("categorical").bind([z[:2], z[2:]], y)
    likelihood = bound.likelihood
    assert bound.plain
    assert torch.equal(bound.residuals([z])[0], likelihood.residual(z, y) / 5)
    assert torch.equal(bound.fisher_product(z, z[None]), likelihood.fisher_product(z, z[None]) / 5)
    assert torch.equal(
        bound.statistics(z, MonteCarlo(), draws()), MonteCarlo().output_vectors(z, y, likelihood, draws())
    )
    assert not Loss.of(nn.CrossEntropyLoss()).bind([z], y).plain


class Doubled(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def test_a_loss_that_is_not_what_its_class_says_is_found_out() -> None:
    z, y = normal(5, CLASSES), labels(5)
    with pytest.raises(ConfigError, match=r"nn\.Doubled gives 2\.\d+ .*'categorical', 1\.\d+"):
        Loss.of(Doubled()).bind([z], y)
    with pytest.raises(ConfigError, match="itself refuses the mini-batch"):
        Loss.of(nn.CrossEntropyLoss(ignore_index=0)).bind([z], z.softmax(1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.NLLLoss(), "log_softmax, and use nn.CrossEntropyLoss"),
        (nn.BCELoss(), "use nn.BCEWithLogitsLoss"),
        (nn.L1Loss(), "taken are nn.CrossEntropyLoss"),
        (nn.GaussianNLLLoss(), "variance"),
        (nn.MSELoss(reduction="none"), "reduction='mean' or 'sum'"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(4, 1)), "one number an output"),
        (lambda z, y: z, "no loss whose Fisher metric is known"),
        ("nll_loss", "unknown likelihood 'nll_loss'"),
        ("squared", "did you mean 'gaussian'"),
    ],
)
def test_losses_that_are_no_likelihood(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loss.of(value)


def test_names_and_functions_of_torch() -> None:
    for value, kind in (
        ("cross_entropy", nn.CrossEntropyLoss),
        ("ce", nn.CrossEntropyLoss),
        ("mse", nn.MSELoss),
        ("l2", nn.MSELoss),
        ("bce", nn.BCEWithLogitsLoss),
        (nn.functional.cross_entropy, nn.CrossEntropyLoss),
    ):
        assert isinstance(Loss.of(value).likelihood.criterion, kind)


def test_weights_of_another_number_than_outputs() -> None:
    with pytest.raises(ConfigError, match=r"likelihood\.weight has 2 numbers, the model has 3 outputs"):
        Loss.of({"kind": "categorical", "weight": [1.0, 2.0]}).bind([normal(4, 3)], labels(4))


def test_a_copy_of_a_loss_is_its_own() -> None:
    loss = Loss.of(nn.CrossEntropyLoss(weight=WEIGHT))
    z, y = normal(4, 3), labels(4)
    value = loss.bind([z], y).value([z])[0]
    assert torch.equal(copy.deepcopy(loss).bind([z], y).value([z])[0], value)
