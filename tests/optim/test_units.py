"""Inputs in another unit train alike: weights are measured in the size of their inputs (`kfacore.optim.units`)."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC
from kfacore.errors import DataError
from kfacore.network import BlockVector
from kfacore.optim.local import LocalModel
from kfacore.optim.units import Units, sizes_of, units_of
from kfacore.roles.block import Block
from kfacore.roles.samples import LayerSamples

INPUTS = {"kind": "levenberg-marquardt", "lambda0": None, "units": "inputs"}
PARAMETERS = {**INPUTS, "units": "parameters"}
STEPS = 8


class Over(nn.Module):
    """x / u: what makes inputs usual without an optimizer that knows of units."""

    def __init__(self, u: float) -> None:
        super().__init__()
        self.u = u

    def forward(self, x: Tensor) -> Tensor:
        return x / self.u


def chain(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def images(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


def data(k: int, shape: tuple[int, ...], n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.rand(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.flatten(1).sum(1).sin(), *x.flatten(1)[:, :2].unbind(1)], 1)


def trained(model: nn.Module, u: float, shape: tuple[int, ...], opt: KFAC | None = None, **options: Any) -> KFAC:
    """Some steps on inputs times u."""
    opt = opt or KFAC(model, likelihood="gaussian", **options)
    for k in range(opt.steps, opt.steps + STEPS):
        x, y = data(k, shape)
        opt.step(u * x, y)
    return opt


def grouped(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()


def divide(layer: nn.Module, u: float) -> None:
    with torch.no_grad():
        layer.weight /= u  # type: ignore[operator]


@pytest.mark.parametrize("u", [100.0, 0.01, 1e4, 1e-6])
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
@pytest.mark.parametrize(("make", "shape"), [(chain, (5,)), (images, (1, 3, 3)), (grouped, (2, 3, 3))])
def test_data_in_another_unit_trains_alike(make: Any, shape: tuple[int, ...], approx: str, u: float) -> None:
    """With nothing set; the first layer's weights are divided, so that the function is what it was."""
    usual, other = make(), make()
    divide(other[0], u)
    trained(usual, 1.0, shape, approx=approx)
    trained(other, u, shape, approx=approx)
    x, _ = data(99, shape)
    torch.testing.assert_close(other(u * x), usual(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other[0].weight * u, usual[0].weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"approx": "diagonal"},
        {"approx": {"kind": "blockdiag", "max_dim": 4}},
        {"approx": {"kind": "tridiag", "power": 0.7}},
        {"momentum": {"kind": "quadratic-model", "tau2": 0.5, "slope": "model", "iterations": 3}},
        {"weight_decay": 0.0, "momentum": "none", "damping": {**INPUTS, "pi": "net", "gamma_rule": "tied"}},
    ],
)
def test_it_is_training_the_layer_behind_a_division(options: dict[str, Any]) -> None:
    u = 100.0
    plain, divided = chain(), chain()
    divided = nn.Sequential(Over(u), *divided)
    with torch.no_grad():
        divided[1].weight *= u  # type: ignore[operator]
    own = {"damping": INPUTS, **options}
    trained(plain, u, (5,), **own)
    trained(divided, u, (5,), **{**own, "damping": {**own["damping"], "units": "parameters"}})  # type: ignore[dict-item]
    torch.testing.assert_close(plain[0].weight * u, divided[1].weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain[2].weight, divided[3].weight, rtol=1e-9, atol=1e-9)


def test_usual_inputs_are_left_alone_to_the_bit() -> None:
    one, other = chain(), chain()
    trained(one, 1.0, (5,), damping=INPUTS)
    opt = trained(other, 1.0, (5,), damping=PARAMETERS)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert opt.units.values is None


def test_weight_decay_stays_in_the_parameters_own_unit() -> None:
    """M of the local model is v_i^T (F + lambda D + eta I) v_j, in dense matrices."""
    model, u, eta = chain(), 100.0, 0.3
    divide(model[0], u)
    opt = trained(model, u, (5,), damping=INPUTS, weight_decay=eta)
    metric = opt.units.metric
    assert metric is not None
    assert sorted(set(metric.tolist())) == [1.0, u**2]
    v, w = (dense.randn(len(metric), seed=s) for s in (1, 2))
    at = [BlockVector.zeros(opt.linearizer.layers) for _ in range(3)]
    for vector, value in zip(at, (v, w), strict=False):
        vector.flat.copy_(value)
    x, _ = data(1, (5,))
    batch = opt.linearizer(u * x, len(x))
    local = LocalModel(
        batch, opt.loss.likelihood, at[0], torch.tensor(0.7, dtype=torch.float64), eta, len(x), units=opt.units
    )
    damped = local._damped(at[:2], torch.tensor([[v @ v, v @ w], [v @ w, w @ w]]))
    lengths = [[(a * (0.7 * metric + eta) * b).sum() for b in (v, w)] for a in (v, w)]
    torch.testing.assert_close(damped, torch.tensor(lengths), check_dtype=False)

    J, out = dense.randn(len(x), 3, seed=3), at[2]
    found = local.gradient_at(at[1], J, out).flat.clone()
    without = local.fisher_product(J, out).flat + v
    torch.testing.assert_close(found - without, (0.7 * metric + eta) * w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [(24,), (7, 17), (1, 2, 21)])
def test_micro_batches_have_the_units_of_their_union(sizes: tuple[int, ...]) -> None:
    found = []
    for split in (False, True):
        model = chain()
        opt = KFAC(model, likelihood="gaussian")
        for k in range(3):
            x, y = data(k, (5,))
            x = 100.0 * x
            if split:
                opt.step(list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)))
            else:
                opt.step(x, y)
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model = chain()
    opt = trained(model, 100.0, (5,))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    again = chain(4)
    again.load_state_dict(weights)
    other = KFAC(again, likelihood="gaussian")
    other.load_state_dict(state)
    trained(model, 100.0, (5,), opt)
    trained(again, 100.0, (5,), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_units_are_made_of() -> None:
    def of(*squares: float) -> float:
        counts = torch.tensor([7.0 * (x != 0.0) for x in squares], dtype=torch.float64)
        (found,) = units_of([torch.stack([torch.tensor(squares, dtype=torch.float64) * 7.0, counts])])
        return found

    alike = (1.0, 0.031, 2.9, 100.0, 30.0, 3.1, 0.005)
    assert [of(s * s, s * s) for s in alike] == [1.0, 1.0, 1.0, 100.0, 100.0, 10.0, 0.01]
    assert of(1e-6, 1e6) == 1.0, "columns of many units"
    assert of(1e4, 1e4, 0.0, 0.0) == 100.0, "inputs that are always 0"
    assert [of(0.0, 0.0), of(math.nan, 1e4), of(math.inf, 1e4), of()] == [1.0] * 4


def test_what_has_no_unit_is_not_measured() -> None:
    g = torch.ones(1, 4, 2)
    tokens = LayerSamples(torch.tensor([1, 200, 3, -1]), g)
    rows = torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    blocks = [
        Block("words", 300, 2, False),
        Block("norm", 2, 1, False, kind="diagonal"),
        Block("linear", 2, 2, True),
        Block("unused", 3, 2, True),
    ]
    parts = [[tokens, LayerSamples(torch.empty(0), g), LayerSamples(rows, g, count=2), None]]
    sums = sizes_of(parts, blocks, torch.device("cpu"))
    assert [own.sum(1).tolist() for own in sums] == [[0.0, 0.0], [0.0, 0.0], [25.0, 2.0], [0.0, 0.0]]
    assert units_of(sums) == [1.0, 1.0, 10.0, 1.0]


def test_units_of_one_are_none() -> None:
    units = Units()
    units.set([1.0, 1.0], [])
    assert units.values is None
    assert units.metric is None


def test_a_first_step_that_failed_leaves_the_units_of_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was averaged in was in them; before that, as here with other data, they are measured anew."""
    opt = KFAC(chain(), likelihood="gaussian")
    x, y = data(0, (5,))
    with pytest.raises(DataError):
        opt.step(math.nan * x, y)
    broken = RuntimeError("no inverse")

    def fails(*_: Any, **__: Any) -> Any:
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr("kfacore.curvature.preconditioner.Preconditioner.candidates", fails)
        with pytest.raises(RuntimeError, match="no inverse"):
            opt.step(100.0 * x, y)
    opt.step(x, y)
    assert opt.units.values == [100.0, 1.0]


def test_copies_and_moved_models_keep_them() -> None:
    model = chain()
    opt = trained(model, 100.0, (5,))
    copied = copy.deepcopy(opt)
    assert copied.units.values == opt.units.values == [100.0, 1.0]
    model.float()
    x, y = data(50, (5,))
    opt.step(100.0 * x.float(), y.float())
    assert opt.units.values == [100.0, 1.0]
    assert opt.units.metric is not None
    assert opt.units.metric.dtype == torch.float32
