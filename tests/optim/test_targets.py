"""Targets of every mini-batch are looked at: in all dtypes, in the first step and in later ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacore.optim.loss as loss_module
from kfacore import KFAC, host
from kfacore.errors import DataError
from kfacore.optim.guards import require_finite
from kfacore.optim.targets import DeferredRefusal, true_on_host

SMALL = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64]


def net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def inputs() -> Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("outputs", [100, 256, 300])
def test_labels_of_every_integer_dtype(dtype: torch.dtype, outputs: int) -> None:
    """Torch compares small integers in their own dtype, in which 256 is 0."""
    labels = torch.arange(64)
    found = []
    for y in (labels, labels.to(dtype)):
        optimizer = KFAC(net(outputs), likelihood="categorical", estimator="empirical")
        found.append([float(optimizer.step(inputs(), y).loss) for _ in range(3)])
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_small_integers_out_of_range(dtype: torch.dtype) -> None:
    y = torch.zeros(64).to(dtype)
    y[9] = 100
    with pytest.raises(DataError, match="found 100 at example 9"):
        KFAC(net(), likelihood="categorical").step(inputs(), y)


def good(likelihood: str) -> Tensor:
    x = inputs()[:, :3]
    return x.argmax(1) if likelihood == "categorical" else (x > 0).float()


WRONG: list[tuple[str, Any, str]] = [
    ("categorical", -100, r"found -100 at example 5 .*ignore_index=-100"),
    ("categorical", 3, "found 3 at example 5"),
    ("bernoulli", 255.0, r"\[0, 1\], found 0 to 255"),
    ("bernoulli", -0.1, "found -0.1 to 1"),
    ("bernoulli", math.nan, "hold NaN"),
    ("gaussian", math.nan, "hold NaN"),
    ("gaussian", math.inf, "hold NaN or infinity"),
]


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6])
@pytest.mark.parametrize(("likelihood", "value", "message"), WRONG)
def test_wrong_targets_in_any_mini_batch(likelihood: str, value: Any, message: str, step: int) -> None:
    model = net()
    optimizer = KFAC(model, likelihood=likelihood, approx={"kind": "blockdiag", "refresh_growth": None})
    y = good(likelihood)
    for _ in range(step - 1):
        optimizer.step(inputs(), y)
    before = [p.detach().clone() for p in model.parameters()]
    wrong = y.clone()
    wrong.view(64, -1)[5, 0] = value
    with pytest.raises(DataError, match=message):
        optimizer.step(inputs(), wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step(inputs(), y)


def test_targets_of_eight_bits_are_those_of_more() -> None:
    y = good("bernoulli")
    losses = [KFAC(net(), likelihood="bernoulli").step(inputs(), t).loss for t in (y, y.to(torch.float8_e4m3fn))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", ["column", "float column", "one-hot"])
def test_advice_about_the_shape_of_labels_is_right(form: str) -> None:
    y = good("categorical")
    given = {"column": y[:, None], "float column": y[:, None].float(), "one-hot": nn.functional.one_hot(y, 3)}[form]
    followed = {
        "column": (".squeeze(1)", given.squeeze(1)),
        "float column": (".squeeze(1).long()", given.squeeze(1).long()),
        "one-hot": (".argmax(1)", given.argmax(1)),
    }[form]
    with pytest.raises(DataError) as caught:
        KFAC(net(), likelihood="categorical").step(inputs(), given)
    assert str(caught.value).endswith(followed[0])
    assert torch.equal(followed[1], y)


def test_whole_numbers_that_are_quantities() -> None:
    prices = 1000 * torch.arange(64)
    for outputs, y in ((1, prices), (3, prices)):
        with pytest.raises(DataError, match=r"quantities and not classes.*\.float\(\)") as caught:
            KFAC(net(outputs), likelihood="gaussian").step(inputs(), y)
        assert "categorical" not in str(caught.value)
    with pytest.raises(DataError, match="categorical"):
        KFAC(net(), likelihood="gaussian").step(inputs(), good("categorical"))


def test_ignored_labels_and_masks_train() -> None:
    """A mask and ignored labels say the same; the rows are as if they were not there."""
    x, y = inputs(), good("categorical")
    valid = torch.arange(64) % 3 > 0
    padded = torch.where(valid, y, -100)
    runs = []
    for likelihood, batch in (
        (nn.CrossEntropyLoss(), (x, padded)),
        ({"kind": "categorical", "ignore_index": -100}, (x, padded)),
        ("categorical", (x, padded, valid)),
        ("categorical", (x, y, valid.long())),
        ("categorical", (x[valid], y[valid])),
    ):
        options: dict[str, Any] = {
            "estimator": {"kind": "exact", "tau1": 1.0},
            "damping": {"kind": "fixed", "gamma": 0.01},
        }
        optimizer = KFAC(net().double(), likelihood=likelihood, approx="blockdiag", **options)
        rows = (batch[0].double(), *batch[1:])
        runs.append(float(optimizer.step(*rows).loss))
    assert runs == pytest.approx([runs[0]] * len(runs), rel=1e-12)


def test_targets_that_require_gradients_are_constants() -> None:
    x, y = inputs(), good("bernoulli")
    found = []
    for targets in (y, y.clone().requires_grad_()):
        optimizer = KFAC(net(), likelihood="bernoulli", weight_decay=1e-3)
        found.append([float(optimizer.step(x, targets).loss) for _ in range(4)])
    assert found[0] == found[1]


def test_a_flag_is_read_from_host_memory() -> None:
    flags = torch.tensor([False, True, False])
    assert [true_on_host(flag) for flag in flags] == [False, True, False]


def test_what_only_the_device_knows_is_refused_at_the_next_look() -> None:
    deferred = DeferredRefusal()
    assert deferred.fine is None
    for step, wrong in enumerate((False, False, True, False, True), start=1):
        deferred.note(torch.tensor(wrong), step)
    assert not bool(deferred.fine)
    number, damping = torch.tensor(1.0), (torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(DataError, match="the mini-batch of step 3 held targets that are out of range"):
        require_finite("objective", number, number[None], number[None], step=6, damping=damping, deferred=deferred)
    require_finite("objective", number, number[None], number[None], step=6, damping=damping, deferred=deferred)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that is not waited for: CUDA where there is one, and the CPU taken for one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    monkeypatch.setattr(loss_module, "on_host", lambda tensor: False)
    monkeypatch.setattr(host, "is_free", lambda value: False)
    return str(request.param)


@pytest.mark.parametrize(("likelihood", "value", "message"), WRONG)
def test_a_wrong_target_on_a_device_does_not_count(likelihood: str, value: Any, message: str, device: str) -> None:
    """It leaves no trace in its own step, and is refused in the next one that waits, before the parameters move."""
    model, twin = net().to(device), net().to(device)
    approx = {"kind": "blockdiag", "refresh_growth": None}
    options: dict[str, Any] = {"likelihood": likelihood, "approx": approx, "trust": "none"}
    optimizer, other = KFAC(model, **options), KFAC(twin, **options)
    x, y = inputs().to(device), good(likelihood).to(device)
    with pytest.raises(DataError, match=message):  # wholly checked while the form is new
        KFAC(net().to(device), **options).step(x, spoiled(y, value))
    for _ in range(3):
        optimizer.step(x, y)
        other.step(x, y)
    report = optimizer.step(x, spoiled(y, value))
    reference = other.step(x, spoiled(y, float("nan") if y.is_floating_point() else 77))
    assert bool(report.loss.isfinite())
    assert float(report.loss) == float(reference.loss), "whatever is there does not matter"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(DataError, match="the mini-batch of step 4 held targets that are out of range"):
        optimizer.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step(x, y)


def test_a_mini_batch_on_a_device_in_which_nothing_counts(device: str) -> None:
    x, y = inputs().to(device), good("categorical").to(device)
    model = net().to(device)
    approx = {"kind": "blockdiag", "refresh_growth": None}
    optimizer = KFAC(model, likelihood=nn.CrossEntropyLoss(), approx=approx, trust="none")
    for _ in range(3):
        optimizer.step(x, y)
    optimizer.step(x, torch.full_like(y, -100))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(DataError, match=r"the mini-batch of step 4 .*none that counts"):
        optimizer.step(x, y)


def spoiled(y: Tensor, value: Any) -> Tensor:
    wrong = y.clone()
    wrong.view(64, -1)[5, 0] = value
    return wrong
