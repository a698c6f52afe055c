"""What cannot be linearised is refused, and the message names the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import dense
import pytest
import torch
from torch import Tensor, nn

from kfacore.errors import DataError, UnsupportedModelError
from kfacore.network import BlockVector, checks
from kfacore.network import Linearizer as AnyLinearizer

Linearizer = partial(AnyLinearizer, unsupported="error")


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.view(-1, 1, 4, 4)).flatten(1))


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


class Functional(nn.Module):
    """The encoder's weight is used again, transposed, without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh() @ self.encoder.weight


class OnlyItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh() @ self.head.weight.T


class DeadEnd(nn.Module):
    """The side layer runs, but nothing depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.head = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return self.head(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).detach())


class Positions(nn.Module):
    """One set of weights over several positions of a case."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x.view(-1, 2, 2)).flatten(1))


class CentredCases(nn.Module):
    """Mixes cases without a module that could be blamed but itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return z - z.mean(0)


class FlatOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(1)


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class LooseParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def sequential(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), *modules, nn.Linear(6, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (Convolution, r"^features\.0: Conv2d has trainable parameters \(weight, bias\)"),
    "used twice": (UsedTwice, r"^shared: used twice in one forward pass"),
    "tied": (Tied, r"^decoder: shares a trainable parameter with encoder"),
    "functional": (Functional, r"^encoder: its weights are used outside its own forward"),
    "only its weight": (OnlyItsWeight, r"^head: not called in the forward pass"),
    "dead end": (DeadEnd, r"^side: the model's output does not depend on it"),
    "detached": (Detached, r"^body: the model's output does not depend on it"),
    "positions": (Positions, r"^mix: Linear must get inputs of shape \(examples, features\), found \(3, 2, 2\)"),
    "dropout": (sequential(nn.Dropout(0.5)), r"^1 \(Dropout\) mixes examples or draws random numbers"),
    "frozen batch norm in train mode": (
        sequential(nn.Tanh(), nn.BatchNorm1d(6).requires_grad_(False)),
        r"^2 \(BatchNorm1d\) mixes examples or draws random numbers",
    ),
    "batch norm": (sequential(nn.BatchNorm1d(6)), r"^1: BatchNorm1d has trainable parameters \(weight, bias\)"),
    "centred cases": (CentredCases, r"^CentredCases mixes examples or draws random numbers"),
    "flat output": (FlatOutput, r"^the model must return outputs of shape \(3, outputs\), found \(3,\)"),
    "own forward": (lambda: nn.Sequential(OwnLinear(4, 2)), r"^0: OwnLinear has trainable parameters"),
    "loose parameter": (LooseParameter, r"^\(the model itself\): LooseParameter has trainable parameters \(scale\)"),
    "reparameterised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))),
        r"^0: ParametrizedLinear (must have a plain trainable weight|has trainable)|^0\.parametrizations",
    ),
    "bias alone": (
        lambda: nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Tanh(), frozen_weight()),
        r"^2: Linear must have a plain trainable weight, found trainable bias",
    ),
    "nothing trainable": (lambda: nn.Linear(4, 2).requires_grad_(False), r"^the model has no trainable parameters"),
    "half precision": (
        lambda: nn.Sequential(nn.Linear(4, 2)),
        r"^0: its parameters are bfloat16, in which factors cannot be inverted",
    ),
    "mixed dtypes": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).float()),
        r"must share one device and dtype; found torch\.float32 on cpu, torch\.float64 on cpu",
    ),
}


def frozen_weight() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    torch.manual_seed(0)
    model = build()
    if name == "half precision":
        model.bfloat16()
    elif name != "mixed dtypes":
        model.double()
    else:
        model[0].double()
    width = 16 if name == "convolution" else 4
    with pytest.raises(UnsupportedModelError, match=message):
        Linearizer(model)(dense.randn(8, width), 3)


def test_a_batch_of_one_does_not_end_the_search_for_mixed_cases() -> None:
    """One case cannot show that cases are mixed; the first larger batch does."""
    linearizer = Linearizer(CentredCases().double())
    linearizer(dense.randn(1, 4))
    with pytest.raises(UnsupportedModelError, match="CentredCases mixes examples"):
        linearizer(dense.randn(8, 4))


def test_dropout_that_is_switched_on_later_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double().eval()
    linearizer = Linearizer(model)
    linearizer(dense.randn(8, 4))
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"^1 \(Dropout\) mixes examples or draws random numbers"):
        linearizer(dense.randn(8, 4))


@pytest.mark.parametrize("model", [nn.Dropout(0.5), None])
def test_an_output_layer_that_starts_at_zero_hides_nothing_for_good(model: nn.Module | None) -> None:
    """z and all derivatives are zero below it: nothing is to be seen until it has moved."""
    head = nn.Linear(6, 2)
    nn.init.zeros_(head.weight)
    net = nn.Sequential(nn.Linear(4, 6), model, head).double() if model is not None else TiedBelow(head).double()
    linearizer = Linearizer(net)
    linearizer(dense.randn(8, 4))
    with torch.no_grad():
        head.weight.copy_(dense.randn(2, 6))
    with pytest.raises(UnsupportedModelError, match="mixes examples" if model is not None else "used outside its own"):
        linearizer(dense.randn(8, 4))


class TiedBelow(nn.Module):
    """Uses a weight a second time, below the output layer."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head((self.a(x) + x @ self.a.weight.T).tanh())
        return result


def test_a_layer_that_stays_dead_is_not_checked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = checks.check_cases
    monkeypatch.setattr(checks, "check_cases", lambda *given: calls.append(1) or check(*given))
    head = nn.Linear(6, 2)
    nn.init.zeros_(head.weight)
    linearizer = Linearizer(nn.Sequential(nn.Linear(4, 6), head).double())
    for _ in range(6):
        linearizer(dense.randn(8, 4))
    assert len(calls) == 3


@pytest.mark.parametrize(("place", "frozen", "done"), [("0.bias", True, "frozen"), ("2.weight", False, "unfrozen")])
def test_parameters_must_not_be_frozen_or_unfrozen_later(place: str, frozen: bool, done: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    if not frozen:
        model[2].requires_grad_(False)
    linearizer = Linearizer(model)
    linearizer(dense.randn(8, 4))
    model.get_parameter(place).requires_grad_(not frozen)
    with pytest.raises(UnsupportedModelError, match=rf"^{place} was {done} .* build the optimizer again"):
        linearizer(dense.randn(8, 4))


def test_a_forward_of_somebody_else_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    layer = model[0]
    own = layer.forward
    calls = []

    def wrapped(input: Tensor) -> Tensor:
        calls.append(1)
        return own(input)

    layer.forward = wrapped
    linearization = Linearizer(model)(dense.randn(8, 4))
    vector = BlockVector.zeros(linearization.layers)
    linearization.jvp([vector.blocks])
    assert layer.__dict__["forward"] is wrapped
    assert "forward" not in model[2].__dict__
    assert calls


def test_order_must_not_change_between_steps() -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.swapped = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.b, self.a) if self.swapped else (self.a, self.b)
            return second(first(x).tanh())

    model = Swapping().double()
    linearizer = Linearizer(model)
    linearizer(dense.randn(8, 4))
    model.swapped = True
    with pytest.raises(UnsupportedModelError, match=r"^b: the order of the layers changed"):
        linearizer(dense.randn(8, 4))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.middle(h))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class InputAgain(nn.Module):
    """The input itself may skip ahead: only layers count for the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x).tanh(), x], 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Skip, r"^last: depends directly on first, middle, but in a chain it would depend on middle alone"),
        (Parallel, r"^right: depends directly on no layer, but in a chain it would depend on left alone"),
    ],
)
def test_tridiagonal_needs_a_chain(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Linearizer(build().double(), "chain")(dense.randn(8, 4))
    Linearizer(build().double(), "any")(dense.randn(8, 4))


def test_chains_that_are_chains() -> None:
    Linearizer(dense.net((4, 3, 3, 2)), "chain")(dense.randn(8, 4))
    Linearizer(InputAgain().double(), "chain")(dense.randn(8, 4))
    frozen = dense.net((4, 3, 3, 2))
    frozen[2].requires_grad_(False)
    Linearizer(frozen, "chain")(dense.randn(8, 4))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (torch.zeros(0, 4), "no examples"),
        ((torch.zeros(3, 4), torch.zeros(2, 4)), r"\(3, 4\), \(2, 4\)"),
        ({"x": "text"}, "no tensor"),
        (torch.tensor(1.0), r"\(\)"),
    ],
)
def test_inputs_without_common_cases(inputs: object, found: str) -> None:
    with pytest.raises(DataError, match=found):
        Linearizer(dense.net((4, 2)))(inputs)


def test_a_saved_order_of_other_layers_is_refused() -> None:
    linearizer = Linearizer(dense.net((4, 3, 2)))
    with pytest.raises(UnsupportedModelError, match=r"has layers 0, 4; this model has 0, 2"):
        linearizer.set_order(["0", "4"])
