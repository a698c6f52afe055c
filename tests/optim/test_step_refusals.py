"""What a step of `KFAC` refuses: data that does not fit, numbers that are not finite, a model that has changed."""

from __future__ import annotations

import math
from typing import Any

import dense
import pytest
import torch
from test_step import SIZES, Float, data, labels, train
from torch import Tensor, nn

from kfacore import KFAC, host
from kfacore.errors import ConfigError, DataError, NumericalError, UnsupportedModelError


def x_and_y(x: Any, y: Any) -> tuple[Any, Any]:
    return x, y


@pytest.mark.parametrize("later", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (dense.randn(40, 4), dense.randn(40, 2), r"targets: .*\(N, 3\).*found \(40, 2\)"),
        (dense.randn(40, 4), dense.randn(40), r"targets: .*found \(40,\)"),
        (dense.randn(40, 4), dense.randn(39, 3), r"targets: found 39 targets for 40 examples"),
        (dense.randn(40, 4), dense.randn(40, 3).tolist(), r"targets: .*found a list"),
        (dense.randn(40, 4), labels(), r"targets: .*found \(40,\)"),
        (torch.zeros(0, 4), torch.zeros(0, 3), r"no examples"),
        ([], torch.zeros(3, 3), r"no tensor"),
        (
            dense.randn(40, 4).float(),
            dense.randn(40, 3),
            r"^0: Linear has weights in float64 on cpu, found inputs in float32 on cpu",
        ),
        (dense.randn(40, 7), dense.randn(40, 3), r"^0: Linear takes 4 features, found inputs of shape \(\d+, 7\)"),
    ],
)
def test_data_that_does_not_fit(x: Any, y: Any, message: str, later: bool) -> None:
    model = dense.net(SIZES)
    optimizer = KFAC(model, likelihood="gaussian")
    if later:
        optimizer.step(*data())
    before = dense.theta(model)
    with pytest.raises(DataError, match=message):
        optimizer.step(x, y)
    assert torch.equal(dense.theta(model), before)
    optimizer.step(*data())  # nothing was lost
    assert optimizer.steps == 1 + later


def test_targets_without_values() -> None:
    with pytest.raises(DataError, match="targets: they are on meta, where tensors have shapes and no values"):
        KFAC(dense.net(SIZES), likelihood="gaussian").step(data()[0], torch.zeros(40, 3, device="meta"))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_targets_in_another_precision_are_cast(likelihood: str) -> None:
    """As they come out of NumPy."""
    found = []
    for cast in (torch.float32, Float):
        model = dense.net(SIZES).float()
        x, y = data()
        optimizer = KFAC(model, likelihood=likelihood)
        for _ in range(5):
            optimizer.step(x.float(), (y > 0).to(cast))
        found.append(dense.theta(model))
    assert torch.equal(found[0], found[1])


def test_no_other_parameters_can_be_added() -> None:
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian")
    with pytest.raises(ConfigError, match="trains the layers of its model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_targets_that_are_not_finite(value: float) -> None:
    x, y = data()
    y[3, 1] = value
    with pytest.raises(DataError, match="targets: 1 of 40 examples hold NaN or infinity, the first is example 3"):
        KFAC(dense.net(SIZES), likelihood="gaussian").step(x, y)


@pytest.mark.parametrize("where", ["trained", "frozen", "buffer"])
def test_nan_before_the_first_step_is_named(where: str) -> None:
    """No damping mends what was so before the first step."""
    x, y = data()
    model = nn.Sequential(nn.Linear(SIZES[0], 4), nn.BatchNorm1d(4), nn.Linear(4, SIZES[-1])).to(x.dtype).eval()
    tensor = model[1].running_mean if where == "buffer" else model[0].bias
    with torch.no_grad():
        tensor[0] = math.nan
    model[0].bias.requires_grad_(where != "frozen")
    name = "1.running_mean" if where == "buffer" else "0.bias"
    with pytest.raises(NumericalError, match=rf"^step 1: .*and {name} holds NaN or infinity; initialise or load it"):
        KFAC(model, likelihood="gaussian").step(x, y)


def test_a_forward_pass_that_makes_nan_of_finite_numbers() -> None:
    class Root(nn.Module):
        def forward(self, s: torch.Tensor) -> torch.Tensor:
            return s.sqrt()

    x, y = data()
    model = nn.Sequential(nn.Linear(SIZES[0], 4), Root(), nn.Linear(4, SIZES[-1])).to(x.dtype)
    with pytest.raises(NumericalError, match=r"the forward pass makes NaN or infinity of them .* each layer returns"):
        KFAC(model, likelihood="gaussian").step(x, y)


def test_sparse_inputs_are_refused_where_the_model_itself_takes_them() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Dropout(0.1)).double()
    optimizer = KFAC(model, likelihood="categorical")
    x, y = data(8)[0], torch.arange(8) % 3
    optimizer.step(x, y)
    before = dense.theta(model)
    with pytest.raises(DataError, match=r"sparse .*\.to_dense\(\)"):
        optimizer.step(x.to_sparse(), y)
    assert torch.equal(dense.theta(model), before)
    optimizer.step(x, y)


def test_a_parameter_that_got_another_shape() -> None:
    model = dense.net(SIZES)
    optimizer = KFAC(model, likelihood="gaussian")
    train(optimizer, 2)
    model[0].weight.data = torch.zeros(3, 3, dtype=Float)
    with pytest.raises(UnsupportedModelError, match=r"^0\.weight got the shape \(3, 3\) in place of \("):
        train(optimizer, 1)


def test_labels_out_of_range() -> None:
    x, _ = data()
    y = labels()
    y[7] = 3
    with pytest.raises(DataError, match=r"must lie in 0\.\.2 .*found 3 at example 7"):
        KFAC(dense.net(SIZES), likelihood="categorical").step(x, y)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", [0, 39])
@pytest.mark.parametrize("step", [1, 3, 5, 20])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_data_that_is_not_finite_in_steps_that_look(value: float, case: int, step: int, which: str) -> None:
    """Steps that refresh or adapt see it, name the case, and leave model and statistics as they were."""
    model, twin = dense.net(SIZES), dense.net(SIZES)
    optimizer, other = KFAC(model, likelihood="gaussian"), KFAC(twin, likelihood="gaussian")
    train(optimizer, step - 1)
    train(other, step - 1)
    x, y = data(seed=99)
    (x if which == "inputs" else y)[case, 2] = value
    with pytest.raises(DataError, match=rf"^{which}: 1 of 40 examples .*the first is example {case}"):
        optimizer.step(x, y)
    for each in (optimizer, other):
        train(each, 2, start=50)
    assert torch.equal(dense.theta(model), dense.theta(twin))


def test_not_a_number_in_an_ordinary_step_is_found_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    approx = {"kind": "blockdiag", "refresh_growth": None}
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", approx=approx, trust="none")
    monkeypatch.setattr(host, "is_free", lambda value: False)
    train(optimizer, 6)
    x, y = data()
    x[0, 0] = math.nan
    optimizer.step(x, y)  # step 7 does not wait for the device, so it cannot know
    with pytest.raises(
        NumericalError, match=r"^step 10: the objective is not finite .* an earlier mini-batch held NaN"
    ):
        train(optimizer, 4)


def test_an_output_of_the_wrong_shape_is_refused() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).view(-1, 2, 2)

    with pytest.raises(
        DataError, match=r"^targets: outputs of shape \(40, 2, 2\) need .* found \(40, 3\)"
    ):  # outputs (n, 2, 2) for targets (n, 3)
        KFAC(Image().double(), likelihood="gaussian").step(*data())


def test_a_quadratic_model_that_is_not_finite_moves_nothing_in_a_refresh_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = KFAC(
        dense.net(SIZES),
        likelihood="gaussian",
        damping={"kind": "levenberg-marquardt", "lambda_every": 50},
        trust="none",
    )
    train(optimizer, 1)
    model = optimizer._iteration._model
    monkeypatch.setattr(optimizer._iteration, "_model", lambda *given: tuple(part * math.inf for part in model(*given)))
    before = [parameter.detach().clone() for parameter in optimizer.model.parameters()]
    with pytest.raises(NumericalError, match="step 2: the quadratic model is not finite"):
        optimizer.step(*data(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))
