"""Networks of every kind: gradient, J v, replays and rows are those of the plain model; float64."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import any_network
import dense
import pytest
import torch
from any_network import check, linearizer, scattered, seed
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kfacore.errors import DataError, UnsupportedModelError
from kfacore.network import BlockVector

CASES = 10
X = dense.randn(CASES, 6)


@torch.library.custom_op("kfacore_tests::double", mutates_args=())
def double_op(x: Tensor) -> Tensor:
    return 2.0 * x


double_op.register_fake(torch.empty_like)
double_op.register_autograd(lambda ctx, g: 2.0 * g)


@torch.library.custom_op("kfacore_tests::opaque", mutates_args=())
def opaque_op(x: Tensor) -> Tensor:
    return 3.0 * x


opaque_op.register_fake(torch.empty_like)
opaque_op.register_autograd(lambda ctx, g: opaque_op(g.detach()))


class Net(nn.Module):
    """Parts by name and a forward of them."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def net(forward: Any, **parts: Any) -> Any:
    """A function that builds the same net every time."""

    def build() -> nn.Module:
        torch.manual_seed(7)
        made = {
            name: part() if callable(part) and not isinstance(part, nn.Module) else part for name, part in parts.items()
        }
        return scattered(Net(forward, **made))

    return build


def ab(**more: Any) -> dict[str, Any]:
    return {"a": lambda: nn.Linear(6, 5), "b": lambda: nn.Linear(5, 3), **more}


def weighted(m: Any, batch: Any) -> Tensor:
    rows, weights = batch
    return m.b(m.a(torch.stack([row * w for row, w in zip(rows, weights, strict=True)])).tanh())


def python_depth(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    keep = float(torch.rand(()) >= 0.5) / 0.5 if m.training else 1.0
    return m.b(h + keep * m.c(h).tanh())


def buffer_by_position(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh() * m.table[: len(x)])


class Positional(Net):
    def __init__(self, *given: Any, **parts: Any) -> None:
        super().__init__(*given, **parts)
        self.register_buffer("table", dense.randn(CASES, 5, seed=9))


def with_buffer() -> nn.Module:
    torch.manual_seed(7)
    return scattered(Positional(buffer_by_position, a=nn.Linear(6, 5), b=nn.Linear(5, 3)))


SILENT: dict[str, tuple[Any, Any, str]] = {
    "weights of cases in a list": (net(weighted, **ab()), (X, [1.0 + 0.5 * i for i in range(CASES)]), "hold more than"),
    "buffer by position": (with_buffer, X, "its place in the mini-batch"),
    "stochastic depth of a batch": (net(python_depth, **ab(c=lambda: nn.Linear(5, 5))), X, "torch's generator"),
    "stochastic depth by Python's random": (
        net(lambda m, x: m.b(m.a(x).tanh() * (random.random() + 0.5)), **ab()), X, "Python's random"
    ),
    "dropout that drops little": (
        net(lambda m, x: m.b(m.drop(m.a(x).tanh())), a=lambda: nn.Linear(6, 4), drop=lambda: nn.Dropout(0.01),
            b=lambda: nn.Linear(4, 3)), X, "torch's generator"
    ),
    "division by the batch's largest entry": (
        net(lambda m, x: m.b((lambda h: h / h.abs().max())(m.a(x).tanh())), **ab()), X, "depend on other examples"
    ),
    "custom operation without tangent": (net(lambda m, x: m.b(double_op(m.a(x)).tanh()), **ab()), X, ""),
    "noise from a generator of the module": (
        net(lambda m, x: m.b(m.a(x + 0.1 * torch.randn(x.shape, generator=m.noise, dtype=x.dtype)).tanh()),
            **ab(noise=lambda: torch.Generator().manual_seed(3))), X, "noise"
    ),
    "slopes drawn for negative entries alone": (
        net(lambda m, x: m.b(m.act(m.a(x))), **ab(act=nn.RReLU)), X, "depend on other examples"
    ),
    "centred cases": (net(lambda m, x: m.b((lambda h: h - h.mean(0))(m.a(x).tanh())), **ab()), X, "other examples"),
    "batch norm": (
        net(lambda m, x: m.b(m.norm(m.a(x)).tanh()), **ab(norm=lambda: nn.BatchNorm1d(5))), X, "other examples"
    ),
    "spectral norm": (
        net(lambda m, x: m.b(m.a(x).tanh()),
            **ab(a=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)))), X, "moves buffers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_what_would_be_silently_wrong_is_right(name: str) -> None:
    build, inputs, whole = SILENT[name]
    if name == "noise from a generator of the module":
        model = build()
        found = linearizer(model)
        start = model.noise.get_state()
        batch = found(inputs)
        model.noise.set_state(start)
        z = model(inputs).detach()
        assert torch.equal(torch.cat(batch.outputs()), z)
        assert torch.equal(batch.again(), z)
    else:
        # A spectral norm's power iteration follows the weights outside the graph, where derivatives do not see it.
        found, batch = check(build, inputs, 4, tolerance=1.0 if name == "spectral norm" else 1e-6)
    assert found.facts is not None
    assert whole in found.facts.whole
    assert bool(whole) == (not found.facts.cut)
    assert batch.model_cases(3) == (CASES if whole else 3)


def shared_in_a_chain() -> nn.Module:
    shared = nn.Linear(6, 6)
    return any_network.scattered(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 3)))


GENERAL: dict[str, tuple[Any, Any]] = {
    "positions": (net(lambda m, x: m.b(m.a(x).tanh()), **ab()), dense.randn(CASES, 4, 6)),
    "pooled positions": (net(lambda m, x: m.b(m.a(x).tanh().mean(1)), **ab()), dense.randn(CASES, 4, 6)),
    "used twice": (
        net(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=lambda: nn.Linear(6, 6), b=lambda: nn.Linear(6, 3)), X
    ),
    "one module under two names": (lambda: shared_in_a_chain(), X),
    "inputs overwritten": (net(lambda m, x: m.b(m.a(x.mul_(2.0).add_(1.0)).tanh()), **ab()), X),
    "functional use": (net(lambda m, x: linear(m.a(x).tanh(), m.a.weight.T), **ab()), X),
    "only its weight": (net(lambda m, x: m.a(x).tanh() @ m.b.weight.T, **ab()), X),
    "not called": (net(lambda m, x: m.b(m.a(x).tanh()), **ab(c=lambda: nn.Linear(3, 3))), X),
    "raw parameters": (
        net(lambda m, x: m.b(m.a(x).tanh() + m.shift) * m.scale,
            **ab(shift=lambda: nn.Parameter(torch.zeros(5)), scale=lambda: nn.Parameter(torch.ones(())))), X
    ),
    "weight norm": (
        net(lambda m, x: m.b(m.a(x).tanh()), **ab(a=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))), X
    ),
    "convolution": (
        net(lambda m, x: m.b(m.a(x).tanh().flatten(1)), a=lambda: nn.Conv1d(2, 4, 2), b=lambda: nn.Linear(8, 3)),
        dense.randn(CASES, 2, 3),
    ),
    "dictionary of outputs": (net(lambda m, x: {"hidden": m.a(x), "logits": m.b(m.a(x).tanh())}, **ab()), X),
    "outputs without axis": (net(lambda m, x: m.b(m.a(x).tanh())[:, 0], **ab()), X),
    "attention": (
        net(lambda m, x: m.b(scaled_dot_product_attention(m.a(x), m.a(x), x[..., :5], is_causal=True)), **ab()),
        dense.randn(CASES, 4, 6),
    ),
    "attention of torch in eval": (
        lambda: net(lambda m, x: m.b(m.att(x, x, x, need_weights=False)[0]),
                    att=lambda: nn.MultiheadAttention(6, 2, batch_first=True), b=lambda: nn.Linear(6, 3))().eval(),
        dense.randn(CASES, 4, 6),
    ),
    "checkpointed": (
        net(lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)), **ab()), X
    ),
    "recurrent": (
        net(lambda m, x: m.b(m.a(x)[0][:, -1]), a=lambda: nn.LSTM(6, 5, batch_first=True), b=lambda: nn.Linear(5, 3)),
        dense.randn(CASES, 4, 6),
    ),
    "dead end": (net(lambda m, x: (m.c(x), m.b(m.a(x).tanh()))[1], **ab(c=lambda: nn.Linear(6, 2))), X),
    "cases flattened into rows": (
        net(lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2]).sum(1), **ab()),
        dense.randn(CASES, 4, 6),
    ),
    "integers": (
        net(lambda m, i: m.b(m.a(i).tanh().mean(1)), a=lambda: nn.Embedding(9, 5), b=lambda: nn.Linear(5, 3)),
        torch.randint(0, 9, (CASES, 4), generator=torch.Generator().manual_seed(2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kept", [None, 3])
@pytest.mark.parametrize("name", GENERAL)
def test_networks_of_every_kind_are_cut_and_right(name: str, kept: int | None) -> None:
    build, inputs = GENERAL[name]
    found, _ = check(build, inputs, kept)
    assert found.facts is not None
    way = "double" if name == "weight norm" else "forward"  # it has no formula for the fused weight norm
    assert (found.facts.cut, found.facts.way) == (True, way), found.facts


def test_a_lost_tangent_is_found_and_double_backward_taken() -> None:
    found, _ = check(*SILENT["custom operation without tangent"][:2])
    assert found.way == "double"
    assert "kfacore_tests.double" in found.reason


def test_what_has_neither_derivative_is_refused_where_a_product_is_asked_for() -> None:
    found = linearizer(net(lambda m, x: m.b(opaque_op(m.a(x)).tanh()), **ab())())
    batch = found(X)
    vector = BlockVector.zeros(found.layers)
    batch.gradient(batch.outputs(), vector)  # the gradient needs none
    with pytest.raises(UnsupportedModelError, match=r"kfacore_tests\.opaque.*momentum = 'fixed', or Preconditioned"):
        batch.jvp([vector.blocks])


def test_draws_that_cannot_be_made_again_are_refused_by_name() -> None:
    hidden = random.Random(3)

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * hidden.random()

    with pytest.raises(UnsupportedModelError, match=r"^noise \(Noise\) draws random numbers from a generator"):
        linearizer(net(lambda m, x: m.b(m.noise(m.a(x))), **ab(noise=Noise))())(X)


def test_a_model_that_begins_to_draw_is_found_out() -> None:
    model = net(lambda m, x: m.b(m.a(x).tanh() * (1 + m.noise * torch.rand(()))), **ab())()
    model.noise = 0.0
    model.run = lambda m, x: m.b(m.a(x).tanh() * ((1 + torch.rand(())) if m.noise else 1.0))
    found = linearizer(model)
    assert found(X).plain
    model.noise = 1.0
    seed()
    batch = found(X)
    assert not batch.plain
    after = torch.get_rng_state()
    seed()
    assert torch.equal(torch.cat(batch.outputs()), model(X).detach())
    assert torch.equal(torch.get_rng_state(), after)


def test_switching_between_train_and_eval_is_looked_at_again() -> None:
    model = net(lambda m, x: m.b(m.drop(m.a(x).tanh())), **ab(drop=lambda: nn.Dropout(0.5)))().eval()
    found = linearizer(model)
    assert found(X).plain
    model.train()
    assert not found(X).plain
    model.eval()
    assert found(X).plain


def test_a_model_that_keeps_what_it_computed_is_cut_and_keeps_its_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.last = m.a(x).tanh()
        return m.b(m.last)

    found, batch = check(net(forward, **ab()), X, 4)
    assert found.facts is not None
    assert found.facts.cut
    assert batch.plain


def test_lazy_modules_get_their_shapes_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3)).double()
    found = linearizer(model)
    assert found.layers == []
    assert len(found.parameters) == 6
    batch = found(X)
    assert found.layers[0].info.name == "0"
    assert found.layers[0].info.shape == (8, 7)
    assert int(model[1].num_batches_tracked) == 1
    assert batch.jvp([BlockVector.zeros(found.layers).blocks]).shape == (1, CASES, 3)


def test_what_was_frozen_or_replaced_is_told() -> None:
    model = net(lambda m, x: m.b(m.a(x).tanh()), **ab())()
    found = linearizer(model)
    found(X)
    assert found.changed() == []
    model.a.bias.requires_grad_(False)
    assert found.changed() == ["a.bias was frozen (requires_grad = False)"]
    model.b = nn.Linear(5, 3).double()
    assert found.changed()[1] == "b was replaced by another module"
    with pytest.raises(UnsupportedModelError, match="build the optimizer again"):
        found(X)


def test_one_case_shows_mixing_too() -> None:
    found = linearizer(net(lambda m, x: m.b((lambda h: h - h.mean(0))(m.a(x))), **ab())())
    found(X[:1])
    assert not found.cut


def test_an_empty_mini_batch_is_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        linearizer(net(lambda m, x: m.b(m.a(x)), **ab())())(X[:0])


def test_a_single_number_is_no_output() -> None:
    with pytest.raises(UnsupportedModelError, match="returned a single number"):
        linearizer(net(lambda m, x: m.b(m.a(x)).sum(), **ab())())(X)


def test_reentrant_checkpoints_run_in_their_other_form() -> None:
    """Dropout inside, and a checkpoint inside a checkpoint; torch's own function is back afterwards."""

    def inner(m: Any, h: Tensor) -> Tensor:
        return checkpoint(lambda u: m.drop(m.a(u)).tanh(), h, use_reentrant=True)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(checkpoint(lambda h: inner(m, h) + 1.0, m.first(x), use_reentrant=True))

    model = net(forward, **ab(first=lambda: nn.Linear(6, 6), drop=lambda: nn.Dropout(0.3)))()
    own = torch.utils.checkpoint.CheckpointFunction
    made = linearizer(model)
    seed()
    batch = made(X)
    vectors = [dense.randn(*z.shape, seed=3) for z in batch.outputs()]
    found = any_network.by_name(made, batch.gradient(vectors, BlockVector.zeros(made.layers), retain=True))
    assert torch.utils.checkpoint.CheckpointFunction is own
    seed()
    z = model(X)
    assert dense.relative(torch.cat(batch.outputs()), z.detach()) < 1e-12
    z.backward(torch.cat(vectors))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert dense.relative(found[name], parameter.grad) < 1e-10
    vector, tensors = any_network.direction(made)
    Jv = batch.jvp([vector.blocks])[0]
    left, right = (torch.cat(vectors) * Jv).sum(), sum((found[name] * step).sum() for name, step in tensors.items())
    assert abs(float(left - right)) < 1e-9 * float(Jv.norm())


def test_scripts_are_refused_by_name() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        inner = torch.jit.script(nn.Linear(6, 5))
    with pytest.raises(UnsupportedModelError, match=r"0 is a TorchScript module, .* train the module that it was made"):
        linearizer(nn.Sequential(inner, nn.Tanh(), nn.Linear(5, 3)))


def test_sparse_gradients_are_made_dense() -> None:
    tokens = torch.tensor([[1, 2, 2], [0, 3, 1], [4, 4, 4], [2, 0, 1]])
    found = []
    for sparse in (True, False):
        parts: dict[str, Any] = {"a": nn.Embedding(6, 5, sparse=sparse), "b": lambda: nn.Linear(5, 3)}
        with torch.no_grad():
            parts["a"].weight.copy_(dense.randn(6, 5))
        batch = linearizer(net(lambda m, i: m.b(m.a(i).tanh().mean(1)), **parts)())(tokens)
        v = [dense.randn(*z.shape, seed=3) for z in batch.outputs()]
        found.append(batch.gradient(v, BlockVector.zeros(batch.layers)).flat)
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)


def test_the_step_is_that_of_the_plain_path_where_a_general_block_is_frozen() -> None:
    """The general gradient and J v against the fast ones on the same net."""
    fast = dense.net((6, 5, 3))
    general = nn.Sequential(*fast, nn.Identity())
    general.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))  # in no way used
    a, b = linearizer(fast), linearizer(general)
    one, other = a(X, 4), b(X, 4)
    assert (one.plain, other.plain) == (True, False)
    vectors = torch.split(dense.randn(CASES, 3), [4, CASES - 4])
    g, h = (batch.gradient(vectors, BlockVector.zeros(f.layers)) for f, batch in ((a, one), (b, other)))
    assert all(dense.relative(x, y) < 1e-12 for x, y in zip(h.blocks, g.blocks, strict=False))
    J = [batch.jvp([v.blocks]) for v, batch in ((g, one), (h, other))]
    assert dense.relative(J[1], J[0]) < 1e-12
    assert any_network.by_name(b, h)["scale"].abs().sum() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_a_copy_works_on_its_own_model(copied: Any) -> None:
    model = scattered(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
    found = linearizer(model)
    found(X)
    other = copied(found)
    assert other.model is not model
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    batch = other(X)
    vector, _ = any_network.direction(other)
    assert batch.jvp([vector.blocks]).abs().sum() > 0
    assert batch.gradient(batch.outputs(), vector).flat.abs().sum() > 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_with_dropout_has_one_mask_in_every_pass(mode: str) -> None:
    """Whatever a layer type puts in the place of torch's forward, further passes run the same."""
    torch.manual_seed(3)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True), 2)
    model = scattered(nn.Sequential(encoder, nn.Linear(6, 3))).train(mode == "train")
    found = linearizer(model)
    batch = found(dense.randn(CASES, 4, 6), 4)
    z, v = torch.cat(batch.outputs()), dense.randn(CASES, 4, 3)
    assert dense.relative(batch.again(), z) < 1e-12
    vector, tensors = any_network.direction(found)
    J = batch.jvp([vector.blocks])[0]
    vectors = torch.split(v, [len(part) for part in batch.outputs()])
    grad = any_network.by_name(found, batch.gradient(vectors, BlockVector.zeros(found.layers)))
    inner = sum((grad[name] * step).sum() for name, step in tensors.items())
    assert abs(float((v * J).sum() - inner)) < 1e-10 * float(v.norm() * J.norm())


def test_inputs_without_a_tensor_that_the_model_does_not_take() -> None:
    with pytest.raises(DataError, match="hold no tensor"):
        linearizer(dense.net((4, 2)))([1.0, 2.0])
