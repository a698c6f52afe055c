"""What layer types read and what they leave alone; calls that the conformance suite has no place for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_modules import Conv1D, LlamaRMSNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from kfac_plugins.layers.attention import Attention
from kfac_plugins.layers.bilinear import Bilinear
from kfac_plugins.layers.convolution import Convolution
from kfac_plugins.layers.embedding import Embedding
from kfac_plugins.layers.hf_conv1d import HfConv1d
from kfac_plugins.layers.linear import LinearLayer
from kfac_plugins.layers.norm import Norm
from kfac_plugins.layers.recurrent import Recurrent
from kfac_plugins.layers.transposed import Transposed
from kfacore.registry import get_registry
from kfacore.roles import Block, Layer, Side, Use

Float = torch.float64


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.double()


def test_every_module_is_read_by_one_type() -> None:
    modules = [
        nn.Linear(2, 2), Conv1D(2, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1),
        nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1), nn.Embedding(2, 2),
        nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2),
        nn.InstanceNorm1d(2, affine=True), nn.InstanceNorm2d(2, affine=True), nn.InstanceNorm3d(2, affine=True),
        nn.MultiheadAttention(2, 1), nn.LSTM(2, 2), nn.GRU(2, 2), nn.RNN(2, 2), nn.LSTMCell(2, 2), nn.GRUCell(2, 2),
        nn.RNNCell(2, 2), LlamaRMSNorm(2),
    ]  # fmt: skip
    for module in modules:
        readers = [layer for layer in get_registry().layers() if layer.matches(module)]
        assert len(readers) == 1, type(module).__name__
        assert readers[0].blocks("m", module)


def test_modules_without_parameters_have_no_blocks() -> None:
    for module in (nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False), nn.InstanceNorm1d(3)):
        assert Norm().matches(module)
        assert Norm().blocks("m", module) == []


class Doubled(nn.Conv2d):
    def _conv_forward(self, *arguments: Any) -> Tensor:
        return 2 * super()._conv_forward(*arguments)


class Shifted(nn.GRU):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(arguments[0] + 1, *arguments[1:])


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (Convolution(), Doubled(2, 2, 1)),
        (Recurrent(), Shifted(2, 2)),
        (Norm(), nn.SyncBatchNorm(2)),
        (Embedding(), nn.Embedding(3, 2, max_norm=1.0)),
        (Embedding(), nn.Embedding(3, 2, scale_grad_by_freq=True)),
        (LinearLayer(), nn.MultiheadAttention(2, 1).out_proj),
        (LinearLayer(), nn.Bilinear(2, 2, 2)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_computes_something_else_is_left_alone(layer: Layer, module: nn.Module) -> None:
    assert not layer.matches(module)


def test_an_instance_with_another_forward_is_left_alone() -> None:
    pairs: list[tuple[Layer, nn.Module]] = [
        (Convolution(), nn.Conv1d(2, 2, 1)),
        (Attention(), nn.MultiheadAttention(2, 1)),
        (Bilinear(), nn.Bilinear(2, 2, 2)),
    ]
    for layer, module in pairs:
        assert layer.matches(module)
        module.forward = lambda *arguments: arguments[0]
        assert not layer.matches(module)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (LinearLayer(), nn.Linear(3, 3)),
        (Convolution(), nn.Conv1d(3, 3, 2)),
        (Transposed(), nn.ConvTranspose1d(3, 3, 2)),
        (Embedding(), nn.Embedding(3, 3)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_weights_computed_from_other_parameters_are_no_blocks(layer: Layer, module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    assert layer.blocks("m", module) == []


def test_lazy_modules_have_no_blocks_before_their_first_call() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = nn.LazyConv2d(2, 1)
    assert Convolution().blocks("m", module) == []
    module(torch.zeros(1, 3, 2, 2))
    (block,) = Convolution().blocks("m", module)
    assert (block.d_in, block.d_out) == (4, 2)


# --- other libraries' modules --------------------------------------------------------------------------------------


class Variant(LlamaRMSNorm):
    """Called an RMS norm; `change` makes it another module."""

    change: Callable[[Any, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def variant(name: str, change: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    kind = type(name, (Variant,), {"change": change})
    made = kind(4).double()
    nn.init.normal_(made.weight)
    return made


def rms(m: Any, x: Tensor, eps: float) -> Tensor:
    return m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("module", "right"),
    [
        (variant("MyRMSNorm", lambda m, x: rms(m, x, 1e-6)), True),
        (variant("MyRMSNorm", lambda m, x: rms(m, x, 0.0)), False),
        (variant("MyRMSNorm", lambda m, x: rms(m, x - x.mean(-1, keepdim=True), 1e-6)), False),
        (variant("MyRMSNorm", lambda m, x: rms(m, x, 1e-6).square()), False),
        (variant("MyRMSNorm", lambda m, x: rms(m, x, 1e-6).sum(-1)), False),
        (variant("MyRMSNorm", lambda m, x: x @ x), False),  # raises
        (variant("Scale", lambda m, x: rms(m, x, 1e-6)), False),
    ],
    ids=["right", "epsilon", "centred", "squared", "shape", "raises", "name"],
)
def test_rms_norms_of_others_are_found_by_what_they_compute(module: nn.Module, right: bool) -> None:
    assert Norm().matches(module) is right


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * gate


class CountingRMSNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))


class WideRMSNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize("kind", [GatedRMSNorm, CountingRMSNorm, WideRMSNorm])
def test_rms_norms_that_may_do_more_are_left_alone(kind: type[nn.Module]) -> None:
    assert not Norm().matches(kind(4))


def test_modules_on_meta_are_left_alone() -> None:
    assert not Norm().matches(LlamaRMSNorm(4).to("meta"))


def test_a_conv1d_of_another_kind_is_left_alone() -> None:
    wrong = type("Conv1D", (Conv1D,), {"forward": lambda self, x: Conv1D.forward(self, x).relu()})(4, 4)
    nn.init.normal_(wrong.weight)
    assert HfConv1d().matches(Conv1D(5, 4))
    assert not HfConv1d().matches(wrong)
    assert not HfConv1d().matches(type("Conv1D", (nn.Conv1d,), {})(2, 2, 1))
    assert not HfConv1d().matches(nn.Linear(2, 2))


# --- blocks --------------------------------------------------------------------------------------------------------


def test_names_and_parameters_of_attention() -> None:
    blocks = Attention().blocks("net.att", nn.MultiheadAttention(4, 2))
    assert [b.name for b in blocks] == ["net.att.q", "net.att.k", "net.att.v", "net.att.out_proj"]
    assert blocks[1].params == ("net.att.in_proj_weight[4:8]", "net.att.in_proj_bias[4:8]")
    assert blocks[3].params == ("net.att.out_proj.weight", "net.att.out_proj.bias")
    wide = Attention().blocks("", nn.MultiheadAttention(4, 2, kdim=3, vdim=2))
    assert [b.name for b in wide] == ["q", "k", "v", "out_proj"]
    assert [(b.d_out, b.d_in) for b in wide] == [(4, 5), (4, 4), (4, 3), (4, 5)]
    assert wide[2].params == ("v_proj_weight", "in_proj_bias[8:12]")


def test_names_of_recurrent_blocks() -> None:
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    names = [b.name for b in Recurrent().blocks("r", module)]
    assert names == [f"r.{w}_l{i}{d}" for i in (0, 1) for d in ("", "_reverse") for w in ("ih", "hh", "hr")]
    assert [b.name for b in Recurrent().blocks("c", nn.GRUCell(2, 3))] == ["c.ih", "c.hh"]


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_that_adds_keys_is_left_to_torch(options: dict[str, bool]) -> None:
    module = nn.MultiheadAttention(4, 2, **options)
    assert Attention().matches(module)
    assert Attention().blocks("a", module) == []
    assert Attention().forward(module, lambda use: None) is None


def test_norms_are_dense_up_to_a_size() -> None:
    (small,), (wide,) = Norm().blocks("n", nn.LayerNorm(128)), Norm().blocks("n", nn.LayerNorm(129))
    assert (small.kind, small.groups, small.d_in, small.size) == ("full", 1, 256, 256)
    assert (wide.kind, wide.groups, wide.d_in, wide.size) == ("full", 129, 2, 258)
    assert wide.why


def test_an_embedding_is_diagonal_on_the_side_of_its_tokens() -> None:
    (block,) = Embedding().blocks("e", nn.Embedding(7, 3))
    assert block == Block("e", 7, 3, False, input_side=Side.DIAGONAL, params=("e.weight",))


def test_a_step_leaves_the_padding_row() -> None:
    module = nn.Embedding(5, 2, padding_idx=3)
    before = module.weight.detach().clone()
    (block,) = Embedding().blocks("e", module)
    with torch.no_grad():
        views = Embedding().view(block, module, dict(module.named_parameters()))
        parts = Embedding().split(block, module, torch.ones(block.shape))
        torch._foreach_add_(views, parts)
    moved = (module.weight != before).all(1)
    assert moved.tolist() == [True, True, True, False, True]


# --- calls ---------------------------------------------------------------------------------------------------------


def told(layer: Layer, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, list[Use]]:
    uses: list[Use] = []
    own = layer.forward(module, uses.append)
    if own is not None:
        return own(*args, **kwargs), uses
    output = module(*args, **kwargs)
    return output, layer.uses(module, args, kwargs, output)


SINGLE: list[tuple[Layer, nn.Module, tuple[tuple[int, ...], ...]]] = [
    (LinearLayer(), nn.Linear(3, 2), ((3,),)),
    (Convolution(), nn.Conv2d(2, 4, 2, groups=2), ((2, 3, 3),)),
    (Convolution(), nn.Conv1d(2, 4, 2, padding=1, padding_mode="circular"), ((2, 3),)),
    (Transposed(), nn.ConvTranspose1d(2, 3, 2, stride=2), ((2, 3),)),
    (Norm(), nn.LayerNorm((2, 3)), ((2, 3),)),
    (Norm(), nn.InstanceNorm2d(2, affine=True), ((2, 3, 3),)),
    (Bilinear(), nn.Bilinear(3, 2, 4), ((3,), (2,))),
    (Attention(), nn.MultiheadAttention(4, 2), ((3, 4), (2, 4), (2, 4))),
    (Recurrent(), nn.LSTM(3, 2, bidirectional=True), ((4, 3),)),
    (Recurrent(), nn.LSTM(3, 2), ((4, 3), ((1, 2), (1, 2)))),  # type: ignore[list-item]
    (Recurrent(), nn.GRU(3, 2, batch_first=True), ((4, 3), (1, 2))),
    (Recurrent(), nn.GRUCell(3, 2), ((3,), (2,))),
    (Recurrent(), nn.LSTMCell(3, 2), ((3,),)),
]


def draw(shape: Any, generator: torch.Generator) -> Any:
    if isinstance(shape[0], tuple):
        return tuple(draw(each, generator) for each in shape)
    return torch.randn(shape, generator=generator, dtype=Float)


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for each in output for t in flat(each)]


@pytest.mark.parametrize(("layer", "module", "shapes"), SINGLE, ids=[str(m)[:40] for _, m, _ in SINGLE])
def test_a_single_case_without_its_axis(layer: Layer, module: nn.Module, shapes: Any) -> None:
    seeded(module)
    generator = torch.Generator().manual_seed(1)
    args = tuple(draw(shape, generator) for shape in shapes)
    wanted = flat(module(*args))
    output, uses = told(layer, module, *args)
    for a, b in zip(flat(output), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    value = sum((z * torch.linspace(0.5, 2.0, z.numel(), dtype=Float).view_as(z)).sum() for z in flat(output))
    assert isinstance(value, Tensor)
    parameters = dict(module.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(value, list(parameters.values()), retain_graph=True), strict=True)
    )
    for block in layer.blocks("m", module):
        mine = [use for use in uses if block.name == ("m." + use.part if use.part else "m")]
        total: Any = 0
        for use, g in zip(mine, torch.autograd.grad(value, [u.output for u in mine], retain_graph=True), strict=True):
            G = layer.gradients(block, module, use, g)
            assert len(G) == 1
            if block.kind == "full":
                total = total + G[0]
            else:
                total = total + torch.einsum("r...o,r...i->...oi", G[0], layer.rows(block, module, use)[0])
        total = total.view(block.shape)
        parts, views = layer.split(block, module, total), layer.view(block, module, gradients)
        for part, view in zip(parts, views, strict=True):
            torch.testing.assert_close(part, view, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_draws_what_torch_draws(need_weights: bool, batch_first: bool) -> None:
    module = seeded(nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=batch_first))
    x = torch.randn(3, 5, 4, dtype=Float, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = module(x, x, x, need_weights=need_weights)
        torch.manual_seed(3)
        found, _ = told(Attention(), module, x, x, x, need_weights=need_weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    assert found[0].stride() == wanted[0].stride()  # dropout behind it draws in the order of memory
    if need_weights:
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_nets_draw_what_torch_draws(packed: bool, batch_first: bool) -> None:
    module = seeded(nn.LSTM(3, 2, 3, dropout=0.5, batch_first=batch_first, bidirectional=True))
    x: Any = torch.randn(4, 4, 3, dtype=Float, generator=torch.Generator().manual_seed(1))
    if packed:
        x = pack_padded_sequence(x, torch.tensor([2, 4, 1, 3]), batch_first=True, enforce_sorted=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = module(x)
        torch.manual_seed(3)
        found, _ = told(Recurrent(), module, x)
    for a, b in zip(flat(found[0].data), flat(wanted[0].data), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sorted_packed_sequences_come_back_as_they_came() -> None:
    module = seeded(nn.RNN(3, 2))
    x = torch.randn(4, 3, 3, dtype=Float, generator=torch.Generator().manual_seed(1))
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 2]))
    (found, last), _ = told(Recurrent(), module, packed)
    wanted, wanted_last = module(packed)
    assert isinstance(found, PackedSequence)
    assert found.sorted_indices is None
    assert torch.equal(found.batch_sizes, wanted.batch_sizes)
    torch.testing.assert_close(found.data, wanted.data, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, wanted_last, rtol=1e-12, atol=1e-12)


def test_steps_beyond_the_end_of_a_sequence_do_not_count() -> None:
    module = seeded(nn.GRU(3, 2, batch_first=True))
    x = torch.randn(3, 4, 3, dtype=Float, generator=torch.Generator().manual_seed(1))
    packed = pack_padded_sequence(x, torch.tensor([2, 4, 1]), batch_first=True, enforce_sorted=False)
    _, uses = told(Recurrent(), module, packed)
    blocks = {block.name: block for block in Recurrent().blocks("", module)}
    for part in ("ih_l0", "hh_l0"):
        counts = [Recurrent().counts(blocks[part], module, use) for use in uses if use.part == part]
        assert torch.cat([c for c in counts if c is not None], 1).sum(1).tolist() == [2, 4, 1]


def test_the_hint_of_a_causal_mask_needs_the_mask() -> None:
    module = seeded(nn.MultiheadAttention(4, 2))
    x = torch.zeros(3, 1, 4, dtype=Float)
    with pytest.raises(RuntimeError):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="must be given"):
        told(Attention(), module, x, x, x, is_causal=True)


def test_several_backward_passes_at_once() -> None:
    """Fused attention's backward runs under vmap as everything else does."""
    module = seeded(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(3, 5, 4, dtype=Float, generator=torch.Generator().manual_seed(1))
    (y, _), uses = told(Attention(), module, x, x, x, need_weights=False)
    v = torch.randn(2, *y.shape, dtype=Float, generator=torch.Generator().manual_seed(2))
    outputs = [use.output for use in uses]
    wanted = [torch.autograd.grad(y, outputs, each, retain_graph=True) for each in v]
    found = torch.autograd.grad(y, outputs, v, is_grads_batched=True)
    for i, each in enumerate(found):
        torch.testing.assert_close(each, torch.stack([w[i] for w in wanted]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (Attention(), nn.MultiheadAttention(4, 2, batch_first=True)),
        (Recurrent(), nn.LSTM(4, 4, 2, batch_first=True, bidirectional=True)),
        (Recurrent(), nn.GRU(4, 4, batch_first=True)),
        (Recurrent(), nn.RNN(4, 4, batch_first=True)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_own_forwards_run_under_autocast(layer: Layer, module: nn.Module) -> None:
    """To what bfloat16 leaves of the digits, with gradients as exact."""
    seeded(module).float()
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    wanted = flat(module(*args))
    with torch.autocast("cpu", torch.bfloat16):
        output, uses = told(layer, module, *args)
    for a, b in zip(flat(output), wanted, strict=True):
        assert float((a.float() - b).detach().abs().max()) < 0.1
    assert {use.output.dtype for use in uses} == {torch.bfloat16}
    gradients = torch.autograd.grad(flat(output)[0].float().sum(), [use.output for use in uses])
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_statistics_of_a_batch_norm_keep_the_digits_of_its_parameters() -> None:
    module = nn.BatchNorm1d(3)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    (use,) = Norm().uses(module, (x,), {}, module(x.float()))
    torch.testing.assert_close(use.extras["mean"][0], x.float().mean(0))
