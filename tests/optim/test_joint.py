"""Several heads: losses and Fishers add, and no head's metric reaches into another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.estimators.empirical import Empirical
from kfac_plugins.estimators.exact import Exact
from kfac_plugins.estimators.monte_carlo import MonteCarlo
from kfacore import KFAC, Joint
from kfacore.errors import ConfigError, DataError

Float = torch.float64
WEIGHTS = {"class": 1.0, "box": 0.5}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=draws(seed), dtype=Float)


def batch(n: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A class a position, two positions, one of them ignored; a box a case."""
    y = torch.randint(3, (n, 2), generator=draws(1))
    y[0, 1] = -100
    return {"class": normal(n, 2, 3), "box": normal(n, 4, seed=2)}, {"class": y, "box": normal(n, 4, seed=3)}


def joint(**options: Any) -> Joint:
    return Joint({"class": nn.CrossEntropyLoss(), "box": nn.MSELoss()}, WEIGHTS, **options)


def objective(outputs: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    classes = nn.functional.cross_entropy(outputs["class"].mT, y["class"])
    return classes + 0.5 * nn.functional.mse_loss(outputs["box"], y["box"])


def test_value_gradient_and_metric_against_autograd() -> None:
    outputs, y = batch()
    loss = joint()
    packed = loss.pack(outputs)
    bound = loss.bind([packed[:1], packed[1:]], y)
    point = packed.clone().requires_grad_()
    value = objective(loss.unpack(point), y)
    (gradient,) = torch.autograd.grad(value, point)
    hessian = torch.autograd.functional.hessian(lambda at: objective(loss.unpack(at), y), packed)
    hessian = hessian.reshape(packed.numel(), packed.numel())
    assert float(bound.value([packed[:1], packed[1:]])[0]) == pytest.approx(float(value.detach()), rel=1e-13)
    torch.testing.assert_close(torch.cat(bound.residuals([packed[:1], packed[1:]])), gradient)
    eye = torch.eye(packed.numel(), dtype=Float).view(-1, *packed.shape)
    torch.testing.assert_close(bound.fisher_product(packed, eye).flatten(1), hessian)
    torch.testing.assert_close(bound.fisher_gram(packed, eye), hessian)
    v = bound.statistics(packed, Exact(), draws())
    found = torch.einsum("kni,knj->nij", v, v) / bound.total()
    per_case = hessian.view(*packed.shape, *packed.shape)
    for n in range(3):
        torch.testing.assert_close(found[n], per_case[n, :, n], rtol=1e-10, atol=1e-13)


def test_drawn_targets_share_a_pass() -> None:
    outputs, y = batch()
    loss = joint()
    packed = loss.pack(outputs)
    bound = loss.bind([packed], y)
    assert bound.statistics(packed, MonteCarlo(), draws()).shape == (1, *packed.shape)
    assert bound.statistics(packed, Empirical(), draws()).shape == (1, *packed.shape)
    v = torch.cat([bound.statistics(packed, MonteCarlo(), draws(seed)) for seed in range(4000)])
    metric = bound.fisher_product(packed, torch.eye(10, dtype=Float)[:, None].expand(10, 3, 10)).permute(1, 2, 0)
    products = torch.einsum("kni,knj->knij", v, v)
    error = products.std(0) / len(v) ** 0.5
    within = torch.block_diag(*[torch.ones(3, 3)] * 2, torch.ones(4, 4)).bool()
    deviation = (products.mean(0) / bound.total() - metric).abs() * within
    assert bool((deviation <= 5 * error / bound.total() + 1e-12).all())


def test_tuples_and_masks() -> None:
    outputs, y = batch()
    heads = Joint(["categorical", "gaussian"])
    packed = heads.pack((outputs["class"], outputs["box"]))
    targets = (y["class"].clamp(min=0), y["box"])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    bound = heads.bind([packed], targets, (mask, None))
    rows = outputs["class"][mask.bool()], targets[0][mask.bool()]
    want = nn.functional.cross_entropy(*rows) + 0.5 * (outputs["box"] - y["box"]).square().sum() / 3
    assert float(bound.value([packed])[0]) == pytest.approx(float(want), rel=1e-12)


def test_what_is_refused() -> None:
    outputs, y = batch()
    loss = joint()
    with pytest.raises(DataError, match="the model's outputs: heads class, box are needed, found class"):
        loss.pack({"class": outputs["class"]})
    with pytest.raises(DataError, match="the model's outputs: heads class, box are needed, found a Tensor"):
        loss.pack(outputs["box"])
    with pytest.raises(DataError, match="targets: heads class, box are needed, found a Tensor"):
        loss.bind([loss.pack(outputs)], y["box"])
    with pytest.raises(DataError, match="targets of head 'box'"):
        loss.bind([loss.pack(outputs)], {**y, "box": y["box"][:, :1]})
    with pytest.raises(ConfigError, match="weights must be positive"):
        Joint({"a": "gaussian"}, {"b": 1.0})
    with pytest.raises(ConfigError, match="heads are none"):
        Joint({})


class TwoHeads(nn.Module):
    """A body, classes at two positions, and a box."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.classes, self.box = nn.Linear(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"class": self.classes(h).view(-1, 2, 3), "box": self.box(h)}


@pytest.mark.parametrize("trust", ["undo", "none"])
def test_kfac_trains_several_heads(trust: str) -> None:
    torch.manual_seed(0)
    model = TwoHeads().double()
    x, (_, y) = normal(40, 5), batch(40)
    optimizer = KFAC(model, likelihood=joint(), approx="blockdiag", trust=trust, weight_decay=0.0)
    before = float(objective(model(x), y).detach())
    reports = [optimizer.step(x, y) for _ in range(10)]
    assert float(reports[0].loss) == pytest.approx(before, rel=1e-12)
    assert float(objective(model(x), y).detach()) < 0.8 * before
