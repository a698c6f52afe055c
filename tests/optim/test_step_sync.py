"""The step does not wait for the device except where the method needs a number on the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from waits import DEVICES, waiting_is_an_error, watch

from kfac_plugins.trust.undo import Undo
from kfacore import KFAC, host


def test_the_watch_sees_every_kind_of_wait() -> None:
    """A watch that sees nothing would prove nothing."""
    x = torch.arange(4.0)
    for look in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 1),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: torch.equal(x, x),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor(2.0),
        lambda: torch.unique(x),
    ):
        with watch() as seen:
            look()
        assert seen.total() >= 1, look
    with watch() as seen:
        y = (x * 2).requires_grad_()
        torch.autograd.grad((y * y).sum(), y)
        torch.where(x > 1, x, 0.0)
    assert seen.total() == 0
    with watch() as seen:
        (x.requires_grad_() * 1.0).register_hook(lambda g: float(g.sum()))
        y = x * 1.0
        y.register_hook(lambda g: g * float(g.sum()))
        y.sum().backward()
    assert seen.total() == 1  # also inside the backward pass


PROBLEMS: dict[str, Any] = {
    "bernoulli": lambda n, g, d: torch.rand(n, 6, generator=g, device=d),
    "categorical": lambda n, g, d: torch.randint(6, (n,), generator=g, device=d),
    "gaussian": lambda n, g, d: torch.randn(n, 6, generator=g, device=d),
}


@pytest.fixture(autouse=True)
def _a_cpu_stands_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU numbers are read in every step, since that costs nothing there; here it does as if it did."""
    monkeypatch.setattr(host, "is_free", lambda value: False)


def optimizer_and_data(
    device: str, likelihood: str = "bernoulli", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[KFAC, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator(device).manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    model.to(device=device, dtype=dtype)
    batches = []
    for _ in range(40):
        x = torch.randn(64, 6, generator=generator, device=device).to(dtype)
        y = PROBLEMS[likelihood](64, generator, device)
        batches.append((x, y.to(dtype) if y.is_floating_point() else y))
    if "preset" not in options:  # no early refreshes, so that the first steps have ordinary ones among them
        approx = options.get("approx", "blockdiag")
        options["approx"] = {"refresh_growth": None, **(approx if isinstance(approx, dict) else {"kind": approx})}
        options.setdefault("trust", {"kind": "undo", "settling": 3, "every_step": False})
    return KFAC(model, likelihood=likelihood, **options), batches


VARIANTS: list[dict[str, Any]] = [
    {"approx": "blockdiag"},
    {"approx": "tridiag"},
    {"approx": {"kind": "tridiag", "tolerance": 0.01}},
    {"likelihood": "categorical"},
    {"likelihood": "gaussian"},
    {"estimator": "exact"},
    {"estimator": "empirical", "likelihood": "categorical"},
    {"momentum": "none"},
    {"momentum": {"kind": "fixed", "lr": 0.1, "mu": 0.5}},
    {"damping": {"kind": "fixed", "lambda0": 0.1}},
    {"preset": "heskes"},
    {"preset": "paper"},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_ordinary_step_never_waits(device: str, options: dict[str, Any]) -> None:
    """Steps 4 and 6 to 9: neither refresh nor adaptation."""
    optimizer, batches = optimizer_and_data(device, **options)
    ordinary = 0
    for k, (x, y) in enumerate(batches[:12], start=1):
        if k <= 3 or k % 5 == 0:
            optimizer.step(x, y)
            continue
        with waiting_is_an_error(device), watch() as seen:
            report = optimizer.step(x, y)
        assert dict(seen) == {}, f"step {k} waits for the device: {dict(seen)}"
        assert not report.refreshed
        assert report.rho is None
        ordinary += 1
    assert ordinary == 7


@pytest.mark.parametrize("device", DEVICES)
def test_a_changing_batch_size_never_waits(device: str) -> None:
    """The exponential schedule makes every mini-batch another size."""
    optimizer, batches = optimizer_and_data(device)
    for k, (x, y) in enumerate(batches[:9], start=1):
        n = 32 + 3 * k
        if k <= 3 or k % 5 == 0:
            optimizer.step(x[:n], y[:n])
            continue
        with waiting_is_an_error(device), watch() as seen:
            optimizer.step(x[:n], y[:n])
        assert dict(seen) == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("approx", "refresh"),
    [
        ({"kind": "blockdiag"}, {"tolist": 1}),  # all Choleskys, or all eigenproblems, are checked together
        # ... and each eigenproblem of a pair: 2 sides, 2 pairs of layers
        ({"kind": "tridiag"}, {"tolist": 1, "_local_scalar_dense": 4}),
    ],
    ids=["blockdiag", "tridiag"],
)
@pytest.mark.parametrize("power", [1.0, 0.85])
@pytest.mark.parametrize("rule", ["compared", "tied"])
def test_what_other_steps_wait_for(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    approx: dict[str, Any],
    refresh: dict[str, int],
    power: float,
    rule: str,
) -> None:
    monkeypatch.setattr(Undo, "shortest", 1.0)  # a step that is shortened is looked at twice
    optimizer, batches = optimizer_and_data(
        device, approx={**approx, "power": power}, damping={"kind": "levenberg-marquardt", "gamma_rule": rule}
    )
    waits = []
    for x, y in batches:
        with watch() as seen:
            optimizer.step(x, y)
        waits.append({key: n for key, n in seen.items() if key != "copy between devices"})
    looks = {"_local_scalar_dense": 1}  # whether inputs and objective are finite
    model = {"_local_scalar_dense": 2}  # whether the step is finite, and whether it is kept
    choice = {"_local_scalar_dense": 1}  # which of three candidates

    def total(*parts: dict[str, int]) -> dict[str, int]:
        return dict(sum((Counter(part) for part in parts), Counter()))

    assert waits[1] == waits[2] == total(looks, refresh, model)
    assert waits[4] == waits[9] == total(looks, model)
    compared = [refresh, refresh, choice] if rule == "compared" else []
    assert waits[19] == waits[39] == total(looks, refresh, *compared, model)
    assert waits[3] == waits[5] == waits[38] == {}


@pytest.mark.parametrize("device", DEVICES)
def test_results_agree_with_the_cpu(device: str) -> None:
    """The same start and data on another device, in double precision; draws differ, so the exact estimator."""
    runs = []
    for place in ("cpu", device):
        optimizer, batches = optimizer_and_data("cpu", dtype=torch.float64, approx="tridiag", estimator="exact")
        model = optimizer.model.to(place)
        moved = KFAC(model, likelihood="bernoulli", approx="tridiag", estimator="exact")
        for x, y in batches[:25]:
            report = moved.step(x.to(place), y.to(place))
        runs.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
        assert report.objective.device.type == torch.device(place).type
    assert float((runs[0] - runs[1]).norm() / runs[0].norm()) < 1e-6
