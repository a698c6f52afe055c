"""Further nets against Jacobians of every case: paddings, groups, transposed, recurrent, norms, attention, tiny ViT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from any_network import scattered
from golden_nets import Net, image
from jacobians import truths
from rooms import Rooms, products
from torch import Tensor, nn

TOLERANCE, GAMMA = 1e-9, 0.3


def conv(module: Callable[[], nn.Module], width: int) -> Callable[[], nn.Module]:
    return lambda: Net(image, conv=module(), head=nn.Linear(width, 3))


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(m.ih(step) + m.hh(h))
    return m.head(h)


def normed(m: Any, x: Tensor) -> Tensor:
    return m.head(m.norm(m.conv(x)).tanh().flatten(2).mean(-1))


class Attention(nn.Module):
    """By hand, of Linear modules."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(other, width), nn.Linear(other, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Torchs(nn.MultiheadAttention):
    """With the parameters of the one by hand."""

    @classmethod
    def of(cls, hand: Attention) -> nn.Module:
        width, other = hand.q.in_features, hand.k.in_features
        made = nn.MultiheadAttention(width, 2, kdim=other, vdim=other, batch_first=True).double()
        with torch.no_grad():
            if made.in_proj_weight is None:
                for name in "qkv":
                    getattr(made, f"{name}_proj_weight").copy_(getattr(hand, name).weight)
            else:
                made.in_proj_weight.copy_(torch.cat([hand.q.weight, hand.k.weight, hand.v.weight]))
            made.in_proj_bias.copy_(torch.cat([hand.q.bias, hand.k.bias, hand.v.bias]))
            made.out_proj.load_state_dict(hand.out_proj.state_dict())
        return made


def attend(att: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return att(x, y) if isinstance(att, Attention) else att(x, y, y, need_weights=False)[0]


def crossing(m: Any, x: Tensor) -> Tensor:
    return m.head(x + attend(m.att, x, torch.cat([x, x.square()], 1)[:, 1:]))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(2, 4, 2, 2),
            nn.Parameter(torch.zeros(4)),
            nn.Parameter(torch.zeros(5, 4)),
        )
        self.ln1, self.att, self.ln2 = nn.LayerNorm(4), Attention(4, 4), nn.LayerNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.pos
        h = self.ln1(x)
        x = x + attend(self.att, h, h)
        x = x + self.down(self.up(self.ln2(x)).tanh())
        return self.head(x[:, 0])


def sequence(n: int = 4, t: int = 3, d: int = 3) -> Tensor:
    return dense.randn(n, t, d, seed=2)


def picture(c: int = 2, size: int = 4, dims: int = 2) -> Tensor:
    return dense.randn(3, c, *[size] * dims, seed=3)


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "reflect": (conv(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 4), picture()),
    "replicate, strides differ": (
        conv(lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), padding_mode="replicate"), 4), picture()
    ),
    "same, even kernel, dilated": (conv(lambda: nn.Conv2d(2, 4, 2, padding="same", dilation=2), 4), picture()),
    "depthwise": (conv(lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), 8), picture(4)),
    "one by one": (conv(lambda: nn.Conv2d(2, 4, 1), 4), picture()),
    "causal 1d": (
        lambda: Net(lambda m, x: m.head(m.conv(nn.functional.pad(x, (4, 0))).tanh().mean(-1)),
                    conv=nn.Conv1d(2, 4, 3, dilation=2), head=nn.Linear(4, 3)), picture(dims=1),
    ),
    "3d circular groups": (
        conv(lambda: nn.Conv3d(2, 4, 2, padding=1, groups=2, padding_mode="circular"), 4), picture(size=3, dims=3)
    ),
    "transposed 1d": (conv(lambda: nn.ConvTranspose1d(2, 4, 3, 2, 1, output_padding=1), 4), picture(dims=1)),
    "transposed 2d": (conv(lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=4, bias=False), 4), picture(4, 3)),
    "transposed 3d": (conv(lambda: nn.ConvTranspose3d(2, 4, 2, 2, dilation=2), 4), picture(size=2, dims=3)),
    "convolution twice": (
        lambda: Net(lambda m, x: m.head(m.conv(m.conv(x).tanh()).tanh().flatten(2).mean(-1)),
                    conv=nn.Conv2d(2, 2, 3, padding=1), head=nn.Linear(2, 3)), picture(),
    ),
    "unrolled recurrent": (
        lambda: Net(recurrent, ih=nn.Linear(3, 4), hh=nn.Linear(4, 4, bias=False), head=nn.Linear(4, 3)), sequence()
    ),
    "embedding": (
        lambda: Net(lambda m, i: m.head(m.emb(i).tanh().mean(1)), emb=nn.Embedding(6, 3), head=nn.Linear(3, 3)),
        torch.randint(6, (4, 3), generator=torch.Generator().manual_seed(1)),
    ),
    "instance norm": (
        lambda: Net(normed, conv=nn.Conv2d(2, 3, 2), norm=nn.InstanceNorm2d(3, affine=True), head=nn.Linear(3, 3)),
        picture(),
    ),
    "group norm": (
        lambda: Net(normed, conv=nn.Conv2d(2, 4, 2), norm=nn.GroupNorm(2, 4), head=nn.Linear(4, 3)), picture()
    ),
    "batch norm 2d": (
        lambda: Net(normed, conv=nn.Conv2d(2, 3, 2), norm=nn.BatchNorm2d(3), head=nn.Linear(3, 3)), picture()
    ),
    "layer norm, two dimensions": (
        lambda: Net(lambda m, x: m.head(m.norm(m.a(x)).tanh().mean(1)), a=nn.Linear(3, 4),
                    norm=nn.LayerNorm((3, 4)), head=nn.Linear(4, 3)), sequence(),
    ),
    "self attention": (
        lambda: Net(lambda m, x: m.head(x + attend(m.att, x, x)), att=Attention(4, 4), head=nn.Linear(4, 3)),
        sequence(d=4),
    ),
    "cross attention": (lambda: Net(crossing, att=Attention(4, 4), head=nn.Linear(4, 3)), sequence(d=4)),
    "tiny ViT": (ViT, picture()),
}  # fmt: skip


def rooms_of(model: nn.Module, x: Tensor) -> Rooms:
    with torch.no_grad():
        z = copy.deepcopy(model)(x)
    y = torch.randint(z.shape[-1], z.shape[:-1], generator=torch.Generator().manual_seed(4))
    per = "position" if z.dim() > 2 else "example"
    return Rooms(model, x, y, {"kind": "categorical", "per": per})


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", NETS)
def test_factors_and_the_preconditioned_gradient(name: str) -> None:
    make, x = NETS[name]
    torch.manual_seed(0)
    model = scattered(make())
    rooms = rooms_of(model, x)
    S = float(rooms.bound.total())
    want = truths(copy.deepcopy(model), x, rooms.loss.likelihood, S)
    samples = rooms.exact()
    found = rooms.factors(samples)
    assert found.keys() == want.keys()
    gradient = rooms.gradient()
    solved = rooms.preconditioned(samples, gradient, GAMMA, {"kind": "blockdiag", "power": 1.0})
    for block, info in enumerate(rooms.infos):
        values, truth = found[info.name], want[info.name]
        V, U = gradient.blocks[block], solved.blocks[block]
        if info.kind == "diagonal":
            assert relative(values[0].flatten(), truth.diagonal()) < TOLERANCE
            assert relative(U.flatten(), V.flatten() / (truth.diagonal() + GAMMA**2)) < TOLERANCE
            continue
        if info.kind == "full":
            assert relative(values[0].squeeze(), truth) < TOLERANCE
            damped = truth + GAMMA**2 * torch.eye(len(truth), dtype=V.dtype)
            assert relative(U.flatten(), torch.linalg.solve(damped, V.flatten())) < TOLERANCE
            continue
        for product, other in zip(products(values), products(truth), strict=True):
            assert relative(product, other) < TOLERANCE, info.name
        for A, G, u, v in zip(*truth, U.view(-1, *info.shape[-2:]), V.view(-1, *info.shape[-2:]), strict=True):
            pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
            left = torch.linalg.solve(G + GAMMA / pi * torch.eye(len(G), dtype=v.dtype), v)
            damped = A + pi * GAMMA * torch.eye(len(A), dtype=v.dtype)
            assert relative(u, torch.linalg.solve(damped, left.mT).mT) < 1e-8, info.name


@pytest.mark.parametrize("name", NETS)
def test_gradient_and_products_are_those_of_the_plain_model(name: str) -> None:
    make, x = NETS[name]
    torch.manual_seed(0)
    model = scattered(make())
    rooms = rooms_of(model, x)
    plain = copy.deepcopy(model)
    z = plain(x)
    assert relative(rooms.z, z.detach()) < 1e-12
    logits, y = z.flatten(0, -2), rooms.bound.y.flatten().long()
    nn.functional.cross_entropy(logits, y).backward()
    for key, g in rooms.by_name(rooms.gradient()).items():
        truth = plain.get_parameter(key).grad
        assert truth is not None
        assert float((g - truth).abs().max()) < 1e-11, key
    tensors = {key: dense.randn(*p.shape, seed=i) for i, (key, p) in enumerate(model.named_parameters())}
    (Jv,) = rooms.batch.jvp([rooms.direction(tensors).blocks])
    own = {key: p.detach() for key, p in plain.named_parameters()}
    buffers = {key: buffer.clone() for key, buffer in plain.named_buffers()}

    def z_of(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(plain, {**p, **{key: b.clone() for key, b in buffers.items()}}, (x,))

    _, wanted = torch.func.jvp(z_of, (own,), (tensors,))
    assert relative(Jv, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["self attention", "cross attention", "tiny ViT"])
def test_torchs_attention_is_that_of_linear_modules(name: str) -> None:
    make, x = NETS[name]
    hand = scattered(make())
    fused = copy.deepcopy(hand)
    fused.att = Torchs.of(hand.att)  # type: ignore[arg-type]
    found, wanted = (r.factors(r.exact()) for r in (rooms_of(fused, x), rooms_of(hand, x)))
    assert found.keys() == wanted.keys()
    for block, values in found.items():
        for value, other in zip(values, wanted[block], strict=True):
            assert relative(value, other) < TOLERANCE, block


def test_torchs_lstm_is_that_of_linear_modules() -> None:
    def by_hand(m: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (m.ih(step) + m.hh(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return m.head(h)

    hand = scattered(Net(by_hand, ih=nn.Linear(3, 16), hh=nn.Linear(4, 16), head=nn.Linear(4, 3)))
    fused = Net(lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, 3))
    fused.double()
    with torch.no_grad():
        for part in ("ih", "hh"):
            for key in ("weight", "bias"):
                getattr(fused.lstm, f"{key}_{part}_l0").copy_(getattr(getattr(hand, part), key))
    fused.head = copy.deepcopy(hand.head)
    x = sequence()
    found, wanted = (r.factors(r.exact()) for r in (rooms_of(fused, x), rooms_of(hand, x)))
    for block, other in (("lstm.ih_l0", "ih"), ("lstm.hh_l0", "hh"), ("head", "head")):
        for a, b in zip(found[block], wanted[other], strict=True):
            assert relative(a, b) < TOLERANCE
