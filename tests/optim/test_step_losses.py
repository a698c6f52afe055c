"""Whole steps with torch's losses, masks and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_step_sync import watch
from torch import Tensor, nn

from kfacore import KFAC, host

Float = torch.float64


def net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def inputs() -> Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(1), dtype=Float)


def trained(likelihood: Any, y: Tensor, steps: int = 12, **options: Any) -> tuple[list[float], Tensor]:
    model = net()
    optimizer = KFAC(model, likelihood=likelihood, **options)
    losses = [float(optimizer.step(inputs(), y).loss) for _ in range(steps)]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_cross_entropy_is_the_categorical_likelihood() -> None:
    y = inputs()[:, :3].argmax(1)
    want, theta = trained("categorical", y)
    for likelihood in (nn.CrossEntropyLoss(), "cross_entropy", {"kind": "categorical", "ignore_index": -1}):
        found, other = trained(likelihood, y)
        assert found == pytest.approx(want, rel=1e-9)
        torch.testing.assert_close(other, theta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", ["levenberg-marquardt", {"kind": "levenberg-marquardt", "gamma_rule": "compared"}])
def test_the_path_does_not_depend_on_the_scale(damping: Any) -> None:
    """Gradient, Fisher and lambda follow the factor of the loss, and so does what is reported."""
    y = inputs()[:, :3].tanh()
    options: dict[str, Any] = {"weight_decay": 0.0, "damping": damping}
    want, theta = trained("gaussian", y, **options)
    for likelihood, factor in (
        ({"kind": "gaussian", "scale": 64.0}, 64.0),
        ({"kind": "gaussian", "variance": 1.0, "mean_outputs": True}, 1 / 3),
        (nn.MSELoss(), 2 / 3),
        ("mse", 2 / 3),
    ):
        found, other = trained(likelihood, y, **options)
        assert found == pytest.approx([factor * loss for loss in want], rel=1e-6)
        torch.testing.assert_close(other, theta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.5])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.5]), label_smoothing=0.1),
    ],
    ids=str,
)
def test_training_lowers_the_users_own_loss(criterion: nn.Module) -> None:
    y = inputs()[:, :3].argmax(1)
    model = net()
    optimizer = KFAC(model, likelihood=criterion)

    @torch.no_grad()
    def theirs(trained: nn.Module) -> float:
        return float(criterion.double()(trained(inputs()), y))

    for _ in range(15):
        before = theirs(model)
        assert float(optimizer.step(inputs(), y).loss) == pytest.approx(before, rel=1e-6)
    assert theirs(model) < 0.7 * theirs(net())


@pytest.mark.parametrize(
    "likelihood",
    [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.5]), label_smoothing=0.1), nn.CrossEntropyLoss()],
    ids=["weighted", "plain"],
)
def test_masks_and_options_wait_for_nothing(likelihood: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over positions that count stay on the device; a CPU, where reading costs nothing, stands for one."""
    monkeypatch.setattr(host, "is_free", lambda value: False)
    y = inputs()[:, :3].argmax(1)
    y[::5] = -100
    valid = torch.arange(64) % 2 == 0
    approx = {"kind": "blockdiag", "refresh_growth": None}
    optimizer = KFAC(
        net(), likelihood=likelihood, approx=approx, trust={"kind": "undo", "settling": 3, "every_step": False}
    )
    for step in range(1, 10):
        with watch() as seen:
            optimizer.step(inputs(), y, valid)
        if step > 3 and step % 5:
            assert dict(seen) == {}, f"step {step} waits for the device: {dict(seen)}"
