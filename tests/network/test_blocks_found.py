"""Which parameters become which blocks: layer types, sharing, tying, widths, and what nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import any_network
import dense
import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC
from kfacore.errors import PluginError, UnsupportedModelError
from kfacore.network import BlockVector, Linearizer, find_layers
from kfacore.registry import get_registry
from kfacore.roles import Block, Layer, LayerSamples, Side, Use
from kfacore.schema.slots import LayerConfig


class TokensConfig(LayerConfig):
    kind: Literal["tokens"] = "tokens"


class Tokens(Layer):
    """An embedding, as a third party might read it."""

    Config = TokensConfig

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        tokens, width = module.get_parameter("weight").shape
        return [Block(name, tokens, width, False, input_side=Side.DIAGONAL)]

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors["weight"].T]

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        return [matrix]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        return use.inputs.flatten(1)

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        return g.flatten(1, -2)

    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        return None if module.padding_idx is None else use.inputs.flatten(1) != module.padding_idx


class Wrong(Tokens):
    """Says that a block is what it is not."""

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        return [matrix.T]


class Careless(Tokens):
    """Its rows are not those of its weight."""

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        return 2.0 * g.flatten(1, -2)


TOKENS = torch.randint(0, 7, (9, 4), generator=torch.Generator().manual_seed(1))


class Language(nn.Module):
    def __init__(self, *, bias: bool = False, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb, self.mid, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7, bias=bias)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, i: Tensor) -> Tensor:
        z: Tensor = self.head(self.mid(self.emb(i)).tanh())
        return z


def types(first: Layer) -> list[Layer]:
    return [first, *(each for each in get_registry().layers() if each.config.kind == "linear")]


def facts(model: nn.Module, *given: Any, **options: Any) -> dict[str, tuple[Any, ...]]:
    found = find_layers(model, *given, **options)
    return {block.info.name: (block.info.kind, block.info.shape, block.info.params) for block in found}


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_is_embedding_and_head_is_tied(bias: bool) -> None:
    found = facts(Language(bias=bias), types(Tokens()))
    wanted = {
        "emb": ("tied", (7, 3), ("emb.weight",)),
        "mid": ("kron", (3, 4), ("mid.weight", "mid.bias")),
    }
    assert found == (wanted | {"head.bias": ("diagonal", (1, 7), ("head.bias",))} if bias else wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_weight_has_the_rows_of_both_uses(bias: bool) -> None:
    model = Language(bias=bias).double()
    found = Linearizer(model, layers=types(Tokens()))
    batch = found(TOKENS, 4)
    v = dense.randn(2, 4, 4, 7)
    samples = {b.info.name: s for b, s in zip(found.layers, batch.backpropagate(v), strict=True)}
    body = samples["emb"]
    assert body is not None
    assert body.head is not None
    assert torch.equal(body.inputs, TOKENS[:4].flatten())
    hidden = model.mid(model.emb(TOKENS[:4])).tanh().detach()
    assert torch.equal(body.head.inputs, hidden.flatten(0, 1))
    assert torch.equal(body.head.gradients, v.flatten(1, 2))
    # both together are the whole gradient
    one = torch.nn.functional.one_hot(body.inputs, 7).double()
    parts = body.head.gradients.sum(0).T @ body.head.inputs + one.T @ body.gradients.sum(0)
    (wanted,) = torch.autograd.grad(model(TOKENS[:4]), model.emb.weight, v.sum(0))
    assert dense.relative(parts, wanted) < 1e-12


def test_an_untied_embedding_keeps_its_own_block() -> None:
    found = facts(Language(tied=False), types(Tokens()))
    assert [kind for kind, _, _ in found.values()] == ["kron", "kron", "kron"]
    assert found["emb"][1] == (3, 7)


def shared(bias: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    if bias == "shared":
        model[2].bias = model[0].bias
    return any_network.scattered(model)


def test_modules_that_share_everything_are_one_block() -> None:
    model = shared("shared")
    found = any_network.linearizer(model)
    x = dense.randn(6, 4)
    batch = found(x)
    assert [block.info.name for block in found.layers] == ["0", "4"]
    assert "shared by 0 and 2" in found.layers[0].info.why
    first = batch.backpropagate(dense.randn(1, 6, 2))[0]
    assert first is not None
    assert (first.positions, len(first.inputs)) == (2, 12)
    h = model[0](x).tanh().detach()
    assert dense.relative(first.inputs.view(6, 2, 5)[:, 1, :4], h) < 1e-14
    any_network.check(lambda: shared("shared"), x, 3)


def test_a_shared_weight_with_two_biases_leaves_the_biases_alone() -> None:
    found = facts(shared("own"), get_registry().layers())
    assert found == {
        "0": ("kron", (4, 4), ("0.weight",)),
        "0.bias": ("diagonal", (1, 4), ("0.bias",)),
        "2.bias": ("diagonal", (1, 4), ("2.bias",)),
        "4": ("kron", (2, 5), ("4.weight", "4.bias")),
    }
    any_network.check(lambda: shared("own"), dense.randn(6, 4), 3)


def test_what_is_shared_in_different_ways_is_diagonal() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].weight = nn.Parameter(model[0].weight.detach().T.clone())
    model[4] = nn.Bilinear(4, 4, 2).double()
    found = facts(model, types(Tokens()))
    assert found["4.weight"] == ("diagonal", (1, 32), ("4.weight",))
    assert "no layer type reads weight of Bilinear" in {b.info.why for b in find_layers(model, types(Tokens()))}


def test_a_side_that_is_too_wide_is_diagonal() -> None:
    wide, narrow = find_layers(dense.net((9, 4, 3)), get_registry().layers(), 8)
    assert (wide.info.input_side, wide.info.output_side) == (Side.DIAGONAL, Side.FULL)
    assert "max_dim = 8" in wide.info.why
    assert not wide.fast
    assert narrow.info.plain


def test_frozen_weights_and_biases() -> None:
    model = dense.net((4, 5, 3, 2))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    assert facts(model, get_registry().layers()) == {
        "0": ("kron", (5, 4), ("0.weight",)),
        "2.bias": ("diagonal", (1, 3), ("2.bias",)),
    }


def test_a_block_that_does_not_fit_its_parameters_is_the_types_fault() -> None:
    with pytest.raises(PluginError, match=r"emb: the layer type 'tokens' shows parameters of shapes .* must agree"):
        find_layers(Language(tied=False), types(Wrong()))


def test_rows_that_do_not_account_for_the_gradient_make_a_block_diagonal() -> None:
    found = Linearizer(Language(tied=False).double(), layers=types(Careless()))
    found(TOKENS)
    emb = next(block.info for block in found.layers if block.info.name == "emb.weight")
    assert emb.kind == "diagonal"
    assert "do not account for its gradient" in emb.why
    assert found.notes == [f"emb: {emb.why}"]


def test_blocks_come_in_the_order_of_execution_those_not_called_last() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.second, self.first = nn.Linear(2, 2), nn.Linear(5, 3), nn.Linear(4, 5)
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.second(self.first(x).tanh()) + self.shift
            return z

    found = any_network.linearizer(Swapped().double())
    batch = found(dense.randn(6, 4), 3)
    assert [block.info.name for block in found.layers] == ["first", "second", "shift", "idle"]
    samples = batch.backpropagate(dense.randn(1, 3, 3))
    assert samples[3] is None
    assert all(isinstance(each, LayerSamples) for each in samples[:3])


def test_a_saved_order_brings_its_diagonal_blocks_along() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).tanh() @ self.a.weight

    found = any_network.linearizer(Functional().double())
    found(dense.randn(6, 4))
    names = [block.info.name for block in found.layers]
    assert names == ["a.weight", "a.bias"]
    other = any_network.linearizer(Functional().double())
    other.set_order(names)
    assert [block.info for block in other.layers][1] == found.layers[1].info or other.layers[1].info.kind == "diagonal"
    other(dense.randn(6, 4))
    assert [block.info.name for block in other.layers] == names
    with pytest.raises(UnsupportedModelError, match="this model has"):
        other.set_order(["b"])


def test_vectors_hold_groups_and_any_kind() -> None:
    model = Language(bias=True).double()
    layers = find_layers(model, types(Tokens()))
    vector = BlockVector.zeros(layers)
    assert [tuple(block.shape) for block in vector.blocks] == [block.info.shape for block in layers]
    shapes = [view.shape for block in layers for view in block.views()]
    assert [part.shape for part in vector.parts] == shapes
    vector.flat.fill_(1.0)
    before = [p.detach().clone() for p in model.parameters()]
    torch._foreach_add_([view for block in layers for view in block.views()], vector.parts)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), old + 1.0)
    assert model.head.weight is model.emb.weight


def test_a_tied_weight_of_many_words_keeps_a_diagonal() -> None:
    small, wide = (find_layers(Language(), get_registry().layers(), limit)[0].info for limit in (7, 6))
    assert (small.kind, small.output_side) == ("tied", Side.FULL)
    assert (wide.kind, wide.output_side) == ("tied", Side.DIAGONAL)
    assert "7 words are more than max_dim = 6" in wide.why


def test_pairs_reach_through_norms_but_not_through_other_products() -> None:
    """A norm has a block of its own, and stands between nearly all the products of a transformer."""
    net = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    found = any_network.linearizer(net.double())
    found(dense.randn(5, 3, 4))
    names = [layer.info.name for layer in found.layers]
    assert found.following is not None
    assert [(names[i], names[j]) for i, j in found.following] == [("0", "3"), ("3", "6")]


def test_pairs_share_rows_not_shapes_of_inputs() -> None:
    """A convolution of stride 2 has a quarter of the rows; one of other channels has as many."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 3, stride=2, padding=1),
        nn.Conv2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).double()
    found = any_network.linearizer(net)
    found(dense.randn(5, 2, 4, 4))
    assert found.following == [(0, 1), (2, 3)]
    optimizer = KFAC(net, likelihood="categorical", approx="tridiag")
    optimizer.step(dense.randn(5, 2, 4, 4), torch.arange(5) % 2)
