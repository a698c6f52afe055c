"""A gamma for each block: built-in and given curvature, and the scales that it is measured with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest
from torch import nn

from kfacore.curvature.scales import MeanScales, gammas


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()


def observed(**options: Any) -> Any:
    model = net()
    opt = guest(model, estimator=EXACT, rest="diagonal", **options)
    backward(opt, model, *data())
    opt.curvature.preconditioner.commit()  # type: ignore[union-attr]
    opt.curvature.scales.commit(0.95)  # type: ignore[union-attr]
    return opt


def test_scales_are_roots_of_mean_diagonals() -> None:
    opt = observed(approx={"kind": "blockdiag", "power": 1.0})
    pre = opt.curvature.preconditioner
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    F = pre.refresh([tiny], pi=None)[0][0][1].dense(inverse=False).diagonal()
    found, start = gammas(opt.curvature.scales[MeanScales], 0.5), 0
    for gamma, block in zip(found, pre.layers, strict=True):
        mean = F[start : start + block.size].mean()
        start += block.size
        assert float(gamma) == pytest.approx(0.5 * float(mean.sqrt()), rel=1e-6)


@pytest.mark.parametrize("kind", ["blockdiag", "tridiag"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_each_block_is_damped_by_its_own_gamma(kind: str, power: float) -> None:
    opt = observed(approx={"kind": kind, "power": power, **({"tolerance": 1.0} if kind == "tridiag" else {})})
    pre = opt.curvature.preconditioner
    each = torch.tensor([0.3, 0.7, 0.05], dtype=torch.float64)
    blocks = [torch.randn(layer.shape, dtype=torch.float64) for layer in pre.layers]
    together = pre.refresh([each], pi="layer")[0][0][1].solve(blocks)
    for i, gamma in enumerate(each):
        alone = pre.refresh([gamma], pi="layer")[0][0][1].solve(blocks)
        assert torch.allclose(together[i], alone[i], rtol=1e-12)


def test_who_takes_one_gamma_gets_the_geometric_mean() -> None:
    opt = observed(approx="diagonal")
    pre = opt.curvature.preconditioner
    each = torch.full((len(pre.layers),), 0.3, dtype=torch.float64)
    blocks = [torch.randn(layer.shape, dtype=torch.float64) for layer in pre.layers]
    for a, b in zip(
        pre.refresh([each], pi="layer")[0][0][1].solve(blocks),
        pre.refresh([each[0]], pi="layer")[0][0][1].solve(blocks),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_block_that_saw_nothing_takes_the_mean_of_the_others() -> None:
    values = [torch.tensor(x) for x in (4.0, 0.0, 1.0, 1.0, 2.0, 4.0)]
    assert gammas(values, 1.0).tolist() == pytest.approx([2.0, 2.0, 2.0])
