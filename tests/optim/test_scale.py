"""Factors do not depend on how many cases or positions there are; one case is a mini-batch; a resumed run goes on."""

from __future__ import annotations

import io
from typing import Any

import dense
import pytest
import torch
from any_network import scattered, seed
from golden_nets import Net
from rooms import Rooms
from torch import Tensor, nn
from zoo_images import images, resnet
from zoo_sequences import GPT, words

from kfacore import KFAC


def sequence_net() -> nn.Module:
    return scattered(
        Net(
            lambda m, x: m.b(m.norm(m.a(x).tanh()) * m.scale),
            a=nn.Linear(3, 4),
            norm=nn.LayerNorm(4),
            b=nn.Linear(4, 3),
            scale=nn.Parameter(torch.ones(4)),
        )
    )


def image_net() -> nn.Module:
    conv, mix = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 3, 1)
    return scattered(Net(lambda m, x: m.mix(m.conv(x).tanh()).flatten(2).mT, conv=conv, mix=mix))


def factors(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    with torch.no_grad():
        y = torch.zeros(model(x).shape[:2], dtype=torch.long)
    rooms = Rooms(model, x, y, {"kind": "categorical", "per": "position"})
    return rooms.factors(rooms.exact())


@pytest.mark.parametrize(
    ("make", "x", "dim"),
    [
        (sequence_net, dense.randn(3, 4, 3), 0),
        (sequence_net, dense.randn(3, 4, 3), 1),
        (image_net, dense.randn(2, 2, 3, 3), 0),
        (image_net, dense.randn(2, 2, 3, 3), 3),
    ],
)
def test_factors_do_not_depend_on_the_number_of_cases_or_positions(make: Any, x: Tensor, dim: int) -> None:
    """With everything there twice they are what they were."""
    model = make()
    once, twice = factors(model, x), factors(model, torch.cat([x, x], dim))
    for block, values in once.items():
        for value, other in zip(values, twice[block], strict=True):
            # What is dense or diagonal is of whole cases, whose positions are added before they are squared.
            if dim == 0 or len(values) > 1:
                assert dense.relative(other, value) < 1e-12, block


@pytest.mark.parametrize("name", ["ResNet", "GPT"])
def test_one_case_is_a_mini_batch(name: str) -> None:
    seed()
    model, x, y, likelihood = (resnet(), *images(), "categorical") if name == "ResNet" else words(GPT())
    optimizer = KFAC(model, likelihood=likelihood)
    losses = [float(optimizer.step(x[:1], y[:1]).loss) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
@pytest.mark.parametrize("name", ["CNN", "GPT"])
def test_a_resumed_run_goes_on_bit_for_bit(name: str, approx: str) -> None:
    """Through a file, with nothing but tensors and numbers in it; with batch norm and dropout."""

    def build() -> tuple[nn.Module, KFAC]:
        seed()
        if name == "GPT":
            model: nn.Module = GPT()
        else:
            model = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 4)
            )
        return model, KFAC(model, likelihood="categorical", approx=approx)

    _, x, y, _ = words(GPT()) if name == "GPT" else (None, *images(), None)
    model, optimizer = build()
    for _ in range(5):
        optimizer.step(x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": torch.get_rng_state()}, file)
    want = [float(optimizer.step(x, y).objective) for _ in range(5)]
    again, other = build()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["draws"])
    assert [float(other.step(x, y).objective) for _ in range(5)] == want
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("damping", [{}, {"gamma_rule": "compared"}])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
@pytest.mark.parametrize("scale", [100.0, 0.01])
def test_the_unit_of_targets_does_not_matter(scale: float, decay: float, damping: dict[str, Any]) -> None:
    """Targets and outputs in another unit, weight decay in that of the loss: the same parameters after every step.

    No option has a unit but weight decay, and no constant decides: not in damping, trust, momentum or refreshes.
    """

    def trained(unit: float) -> list[Tensor]:
        seed()
        own = Net(lambda m, x: unit * m.b(m.a(x).tanh()), a=nn.Linear(3, 5), b=nn.Linear(5, 2)).double()
        optimizer = KFAC(
            own,
            likelihood="gaussian",
            weight_decay=decay * unit**2,
            damping={"gamma_max": None, **damping},
            estimator="exact",
        )
        found = []
        for x in torch.randn(25, 12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
            report = optimizer.step(x, unit * torch.stack([x.prod(1), x.sum(1).sin()], 1))
            scalars = torch.stack([report.loss, report.lam, report.model_value]) / unit**2
            found.append(torch.cat([scalars, *(p.detach().flatten() for p in own.parameters())]))
        return found

    for k, (one, other) in enumerate(zip(trained(1.0), trained(scale), strict=True)):
        assert dense.relative(other, one) < 1e-7, k
