"""Generators, buffers and outputs: what lets a pass be run again, and what z is read from."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import any_network
import dense
import numpy as np
import pytest
import torch
from any_network import linearizer, scattered, seed
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.network import BlockVector, read_output
from kfacore.network.draws import Draws, Watch
from kfacore.network.state import ModelState

CPU = torch.device("cpu")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.torch_one = torch.Generator().manual_seed(1)
        self.python_one = random.Random(2)
        self.many = [np.random.default_rng(3), np.random.RandomState(4)]


DRAWN: dict[str, Any] = {
    "torch's generator": lambda m: torch.rand(1),
    "Python's random": lambda m: random.random(),
    "NumPy's random": lambda m: np.random.rand(),
    "torch_one": lambda m: torch.rand(1, generator=m.torch_one),
    "python_one": lambda m: m.python_one.random(),
    "many": lambda m: (m.many[0].random(), m.many[1].rand()),
}


@pytest.mark.parametrize("name", DRAWN)
def test_generators_are_found_and_their_draws_made_again(name: str) -> None:
    model = Holder()
    draws = Draws(model, CPU)
    draws.look()
    before = draws.state()
    assert draws.moved(before) == []
    first = DRAWN[name](model)
    moved = draws.moved(before)
    assert set(moved) == {name}
    after = draws.state()
    with draws.replaying(before):
        assert DRAWN[name](model) == first
    assert draws.moved(after) == []


def test_a_generator_that_only_an_operation_shows_is_met_before_its_first_draw() -> None:
    hidden = torch.Generator().manual_seed(5)
    draws = Draws(nn.Linear(1, 1), CPU)
    watch = Watch(draws)
    with watch:
        first = torch.rand(3, generator=hidden)
    assert draws.moved(watch.first) == ["a torch.Generator of the model"]
    with draws.replaying(watch.first):
        assert torch.equal(torch.rand(3, generator=hidden), first)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.calls, self.last = 0, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.mean(0))
        self.calls += 1
        self.last = x * self.calls
        self.fresh = x
        return x + self.mean


def test_a_pass_runs_on_clones_and_leaves_the_models_own() -> None:
    model, x = Counting(), dense.randn(3, 2).float()
    state = ModelState(model)
    assert not state.moved_buffers()
    first = model(x)
    assert state.moved_buffers()
    assert state.moved_attributes()
    own = model.mean, model.last, model.fresh, model.calls
    values = [tensor.clone() for tensor in own[:3]]
    for _ in range(2):
        with state.replaying():
            assert not hasattr(model, "fresh")
            assert torch.equal(model(x), first)
    assert (model.mean, model.last, model.fresh, model.calls) == own or model.calls == own[3]
    assert model.mean is own[0]
    assert all(torch.equal(a, b) for a, b in zip(own[:3], values, strict=True))


def test_put_back_gives_the_model_its_values_in_their_tensors() -> None:
    model = Counting()
    state, own = ModelState(model), model.mean
    model(torch.ones(3, 2))
    state.put_back()
    assert model.mean is own
    assert not own.any()


class Pair(NamedTuple):
    hidden: int
    z: Tensor


Z = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("found", "output"),
    [
        (Z, None),
        ((Z, 1), None),
        ({"loss": 2.0, "hidden": torch.zeros(4, 1), "logits": Z}, None),
        ({"hidden": torch.zeros(4, 1), "out": Z}, None),
        ({"anything": Z}, None),
        (SimpleNamespace(logits=Z), None),
        (Pair(1, Z), None),
        ({"a": torch.zeros(1), "b": Z}, "b"),
        (SimpleNamespace(z=Z), "z"),
        ([{"z": Z}], lambda found: found[0]["z"]),
    ],
)
def test_outputs_are_found(found: Any, output: Any) -> None:
    assert read_output(found, output) is Z


@pytest.mark.parametrize(
    ("found", "output", "message"),
    [
        ("text", None, "found str"),
        ({"logits": Z}, "z", "found NoneType as output = 'z'"),
        (torch.zeros(()), None, "single number"),
        (torch.zeros(3, 2, dtype=torch.long), None, "floating-point"),
    ],
)
def test_what_is_no_output_is_refused(found: Any, output: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_output(found, output)


def net() -> nn.Module:
    torch.manual_seed(0)
    return scattered(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
def test_wrappers_are_taken_off() -> None:
    model = net()
    assert linearizer(nn.DataParallel(model)).model is model
    assert linearizer(torch.compile(model)).model is model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_part_runs_as_it_was_written() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(net())
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.body(x) * self.scale
            return z

    model = Outer()
    x = dense.randn(6, 4)
    found = linearizer(model)
    batch = found(x, 2)
    vector, tensors = any_network.direction(found)
    names = list(tensors)
    call = lambda *p: torch.func.functional_call(net_of(model), dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    primals = tuple(found.named[name].detach() for name in names)
    _, wanted = torch.func.jvp(call, primals, tuple(tensors.values()))
    assert dense.relative(batch.jvp([vector.blocks])[0], wanted) < 1e-12


def net_of(model: nn.Module) -> nn.Module:
    """The same model without the compiler's wrapper, under the same names."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"_orig_mod": model.body._orig_mod})
            self.scale = model.scale

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.body["_orig_mod"](x) * self.scale
            return z

    return Plain()


def test_outputs_by_name_and_positions_in_every_product() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": x, "mine": self.body(x)}

    x = dense.randn(5, 2, 4)
    found = linearizer(Named(), output="mine")
    batch = found(x, 2)
    vector, _ = any_network.direction(found)
    assert batch.statistics_outputs().shape == (2, 2, 3)
    assert batch.jvp([vector.blocks], 3).shape == (1, 3, 2, 3)
    grad = batch.pull_back(dense.randn(3, 2, 3), BlockVector.zeros(found.layers))
    assert grad.flat.abs().sum() > 0


def test_in_mixed_precision_everything_leaves_in_the_parameters_dtype() -> None:
    model = net().float()
    x = dense.randn(8, 3, 4).float()
    found = linearizer(model)
    batch = found(x, 4, torch.bfloat16)
    full = found(x, 4)
    v = dense.randn(1, 4, 3, 3).float()
    for low, high in zip(batch.backpropagate(v), full.backpropagate(v), strict=True):
        assert low is not None
        assert high is not None
        assert (low.inputs.dtype, low.gradients.dtype) == (torch.float32, torch.float32)
        assert dense.relative(low.gradients, high.gradients) < 0.03
    vectors = [torch.ones_like(z) for z in full.outputs()]
    g, h = (b.gradient(vectors, BlockVector.zeros(found.layers)) for b in (batch, full))
    assert dense.relative(g.flat, h.flat) < 0.03


def test_dropout_masks_are_the_same_for_every_direction_and_in_again() -> None:
    model = scattered(nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)))
    found = linearizer(model)
    seed()
    batch = found(dense.randn(6, 4))
    z = torch.cat(batch.outputs())
    assert torch.equal(batch.again(), z)
    vector, _ = any_network.direction(found)
    both = batch.jvp([vector.blocks, vector.blocks])
    assert torch.equal(both[0], both[1])
    assert torch.equal(batch.again(), z)
