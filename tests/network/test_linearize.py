"""J v, gradients and g_i of every kind of supported model, against autodiff; float64, 1e-10 relative."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.errors import UnsupportedModelError
from kfacore.network import BlockVector, Linearizer
from kfacore.roles import LayerSamples

TOLERANCE = 1e-10
CASES = 9


class Residual(nn.Module):
    """A skip connection: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.middle(h)))


class Branches(nn.Module):
    """Two inputs in a dict, layers registered in another order than they run, a keyword call, a module unused."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 4, bias=False)

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        left = self.left(input=inputs["image"])
        right = self.right(inputs["more"][0])
        return self.last(torch.cat([left.tanh(), right.sigmoid()], 1))


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


def frozen_bias() -> nn.Module:
    model = dense.net((4, 5, 3))
    model[2].bias.requires_grad_(False)
    return model


def frozen_layer() -> nn.Module:
    model = dense.net((4, 5, 4, 3))
    model[2].requires_grad_(False)
    return model


def frozen_front() -> nn.Module:
    """The first layer's input never moves and asks for no gradient."""
    model = dense.net((4, 5, 4, 3))
    model[0].requires_grad_(False)
    return model


def norms_in_eval() -> nn.Module:
    """Dropout and batch norm change nothing in eval mode; the norm's own parameters are frozen."""
    norm = nn.BatchNorm1d(5).requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    return randomise(model).eval()


MODELS = {
    "tanh": lambda: dense.net((4, 5, 6, 3)),
    "logistic, narrow": lambda: dense.net((4, 2, 1, 3), hidden=nn.Sigmoid),
    "without bias": lambda: dense.net((4, 5, 3), bias=False),
    "single layer": lambda: dense.net((4, 3)),
    "relu in place": lambda: randomise(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    ),
    "two layers without units between": lambda: randomise(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))),
    "softplus at the end": lambda: randomise(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Softplus())),
    "residual": lambda: randomise(Residual()),
    "frozen bias": frozen_bias,
    "frozen layer": frozen_layer,
    "frozen front": frozen_front,
    "dropout and batch norm in eval": norms_in_eval,
}


def execution_order(model: nn.Module, linearizer: Linearizer) -> None:
    assert [layer.info for layer in linearizer.layers] == dense.infos(model)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("share", [1, 4, CASES])
def test_outputs_and_gradient_against_autograd(model: nn.Module, share: int) -> None:
    x, y = dense.randn(CASES, 4), dense.randn(CASES, 3, seed=1)
    linearizer = Linearizer(model)
    batch = linearizer(x, share)
    z = torch.cat(batch.outputs())
    assert dense.relative(z, model(x).detach()) < TOLERANCE
    assert batch.statistics_outputs().shape[0] == share
    likelihood = Gaussian()
    targets = torch.split(y, [len(part) for part in batch.outputs()])
    vectors = [likelihood.residual(z, t) for z, t in zip(batch.outputs(), targets, strict=True)]
    grad = batch.gradient(vectors, BlockVector.zeros(linearizer.layers))
    execution_order(model, linearizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(likelihood.nll(model(x), y).sum(), parameters)
    by_parameter = {id(p): g for p, g in zip(parameters, wanted, strict=True)}
    owned = [p for layer in linearizer.layers for p in layer.parameters]
    for part, p in zip(grad.parts, owned, strict=True):
        assert dense.relative(part, by_parameter[id(p)]) < TOLERANCE


def test_gradient_overwrites_what_was_there(model: nn.Module) -> None:
    x = dense.randn(CASES, 4)
    linearizer = Linearizer(model)
    v = dense.randn(CASES, 3)
    fresh = linearizer(x).gradient([v], BlockVector.zeros(linearizer.layers))
    used = BlockVector.zeros(linearizer.layers)
    used.flat.fill_(7.0)
    assert torch.equal(linearizer(x).gradient([v], used).flat, fresh.flat)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("share", [1, 4, CASES])
def test_statistics_against_hooks(model: nn.Module, passes: int, share: int) -> None:
    x = dense.randn(CASES, 4)
    v = dense.randn(passes, share, 3)
    found = Linearizer(model)(x, share).backpropagate(v)
    compare_samples(found, dense.case_samples(model, x[:share], v))


def compare_samples(found: list[LayerSamples], wanted: list[LayerSamples]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert not a.inputs.requires_grad
        assert not a.gradients.requires_grad
        assert dense.relative(a.inputs, b.inputs) < TOLERANCE
        assert dense.relative(a.gradients, b.gradients) < TOLERANCE


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("cases", [1, 5, CASES, None])
def test_jacobian_products_against_autograd(model: nn.Module, directions: int, cases: int | None) -> None:
    """All directions in one pass, on a subset that ends inside, before or after the statistics' chunk."""
    x = dense.randn(CASES, 4)
    linearizer = Linearizer(model)
    batch = linearizer(x, 3)
    J = dense.jacobian(model, x[:cases])
    vectors = dense.randn(directions, J.shape[2])
    layers = dense.infos(model)
    found = batch.jvp([dense.unvec(v, layers) for v in vectors], cases)
    assert dense.relative(found, torch.einsum("nop,kp->kno", J, vectors)) < TOLERANCE


def test_jvp_needs_no_statistics_and_leaves_the_model_as_it_was(model: nn.Module) -> None:
    x = dense.randn(CASES, 4)
    before = model(x).detach()
    linearizer = Linearizer(model)
    batch = linearizer(x)
    zero = BlockVector.zeros(linearizer.layers)
    assert float(batch.jvp([zero.blocks]).abs().max()) == 0.0
    assert torch.equal(model(x).detach(), before)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_jvp_cleans_up_after_an_operation_without_forward_derivative() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return OneWay.apply(self.body(x))

    model = Net().double()
    linearizer = Linearizer(model, unsupported="error")
    batch = linearizer(dense.randn(CASES, 4))
    zero = BlockVector.zeros(linearizer.layers)
    with pytest.raises(UnsupportedModelError, match=r"Net: an operation .* no forward-mode derivative"):
        batch.jvp([zero.blocks])
    assert "forward" not in model.body.__dict__


def test_nested_inputs_and_keyword_calls_in_execution_order() -> None:
    model = randomise(Branches())
    x, more = dense.randn(CASES, 4), dense.randn(CASES, 2, seed=1)
    inputs = {"image": x, "more": (more, "a label"), "scale": 3.0}
    linearizer = Linearizer(model)
    batch = linearizer(inputs, 2)
    assert [layer.info.name for layer in linearizer.layers] == ["left", "right", "last"]
    vectors = [dense.randn(2, 3), dense.randn(CASES - 2, 3, seed=1)]
    parameters = [p for layer in linearizer.layers for p in layer.parameters]
    wanted = torch.autograd.grad(model(inputs), parameters, torch.cat(vectors))
    direction = BlockVector.zeros(linearizer.layers)
    direction.flat.copy_(dense.randn(direction.flat.numel()))
    found = batch.jvp([direction.blocks])[0]
    names = {id(p): name for name, p in model.named_parameters()}
    tangents = {names[id(p)]: part.clone() for p, part in zip(parameters, direction.parts, strict=True)}
    primals = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: tangents[name] for name in primals}
    call = lambda params: torch.func.functional_call(model, params, (inputs,))  # noqa: E731
    assert dense.relative(found, torch.func.jvp(call, (primals,), (tangents,))[1]) < TOLERANCE
    grad = batch.gradient(vectors, BlockVector.zeros(linearizer.layers))
    for part, g in zip(grad.parts, wanted, strict=True):
        assert dense.relative(part, g) < TOLERANCE


def test_user_hooks_still_run() -> None:
    model = dense.net((4, 3, 2))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    linearizer = Linearizer(model)
    batch = linearizer(dense.randn(CASES, 4))
    seen = len(calls)
    batch.jvp([BlockVector.zeros(linearizer.layers).blocks])
    assert seen >= 1
    assert len(calls) == seen + 1


def test_float32_and_bfloat_free() -> None:
    """Everything comes back in the parameters' dtype."""
    model = dense.net((4, 5, 3)).float()
    linearizer = Linearizer(model)
    batch = linearizer(dense.randn(CASES, 4).float(), 3)
    samples = batch.backpropagate(dense.randn(1, 3, 3).float())
    direction = BlockVector.zeros(linearizer.layers)
    assert {s.inputs.dtype for s in samples} | {s.gradients.dtype for s in samples} == {torch.float32}
    assert batch.jvp([direction.blocks]).dtype == torch.float32
    assert direction.flat.dtype == torch.float32


def test_cost_of_partial_passes_follows_their_share() -> None:
    """The sampled pass and J v touch their share of the cases only."""
    rows: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                x.register_hook(lambda g: rows.append(-g.shape[0]))
            rows.append(x.shape[0])
            return x.tanh()

    model = nn.Sequential(nn.Linear(4, 5), Counting(), nn.Linear(5, 3)).double()
    linearizer = Linearizer(model)
    linearizer(dense.randn(64, 4), 8)
    rows.clear()
    batch = linearizer(dense.randn(64, 4), 8)
    assert rows == [8, 56]
    rows.clear()
    batch.backpropagate(dense.randn(1, 8, 3))
    assert rows == [-8]
    rows.clear()
    zero = BlockVector.zeros(linearizer.layers)
    batch.jvp([zero.blocks, zero.blocks], 16)
    assert rows == [32]
