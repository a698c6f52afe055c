"""Twenty nets of ``golden_layers.npz``: their models, and what the file says of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign_modules import Conv1D
from torch import Tensor, nn

FILE = Path(__file__).parent / "data" / "golden_layers.npz"
Case = dict[str, Any]


class Net(nn.Module):
    """Parts by name and a forward of them."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh())


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh().mean(1))


def normed(m: Any, x: Tensor) -> Tensor:
    return m.b(m.norm(m.a(x)).tanh().mean(1))


def image(m: Any, x: Tensor) -> Tensor:
    return m.head(m.conv(x).tanh().flatten(2).mean(-1))


def twice(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(m.a(x).tanh()).tanh())


def attending(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return m.b(x + m.att(x, x, x, attn_mask=mask, need_weights=False)[0])


def tied() -> Net:
    net = Net(
        lambda m, x: m.head(m.mid(m.emb(x)).tanh()),
        emb=nn.Embedding(5, 3), mid=nn.Linear(3, 3), head=nn.Linear(3, 5, bias=False),
    )  # fmt: skip
    net.head.weight = net.emb.weight  # type: ignore[union-attr, assignment]
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Net(chain, a=nn.Linear(3, 4), b=nn.Linear(4, 3)),
    "expand_token_mean": lambda: Net(chain, a=nn.Linear(3, 4), b=nn.Linear(4, 3)),
    "expand_ignored_tokens": lambda: Net(chain, a=nn.Linear(3, 4), b=nn.Linear(4, 3)),
    "reduce_mean": lambda: Net(pooled, a=nn.Linear(3, 4), b=nn.Linear(4, 3)),
    "deep_linear_expand": lambda: nn.Sequential(),
    "hf_conv1d": lambda: Net(chain, a=Conv1D(4, 3), b=Conv1D(3, 4)),
    "conv1d_circular": lambda: Net(
        image, conv=nn.Conv1d(2, 4, 3, 2, 1, 2, padding_mode="circular"), head=nn.Linear(4, 3)
    ),
    "conv2d_zeros": lambda: Net(image, conv=nn.Conv2d(2, 4, 2, 2, 1), head=nn.Linear(4, 3)),
    "conv2d_groups": lambda: Net(image, conv=nn.Conv2d(4, 6, 2, groups=2, dilation=2), head=nn.Linear(6, 3)),
    "conv2d_per_pixel": lambda: Net(
        lambda m, x: chain(m, x).flatten(2).mT, a=nn.Conv2d(2, 3, 2, padding=1), b=nn.Conv2d(3, 3, 2)
    ),
    "conv3d_zeros": lambda: Net(image, conv=nn.Conv3d(2, 4, 2, padding=1), head=nn.Linear(4, 3)),
    "convT2d_groups": lambda: Net(
        image,
        conv=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, dilation=2, padding=1),
        head=nn.Linear(4, 3),
    ),
    "embedding_padding": lambda: Net(
        lambda m, x: m.head(m.emb(x).tanh()), emb=nn.Embedding(6, 3, padding_idx=0), head=nn.Linear(3, 6)
    ),
    "layernorm_seq": lambda: Net(normed, a=nn.Linear(3, 4), norm=nn.LayerNorm(4), b=nn.Linear(4, 3)),
    "rmsnorm_seq": lambda: Net(normed, a=nn.Linear(3, 4), norm=nn.RMSNorm(4), b=nn.Linear(4, 3)),
    "batchnorm_train": lambda: Net(
        lambda m, x: m.b(m.norm(m.a(x)).tanh()), a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 3)
    ),
    "mha_self_causal": lambda: Net(
        attending, att=nn.MultiheadAttention(4, 2, batch_first=True), b=nn.Linear(4, 3)
    ),
    "module_used_twice": lambda: Net(twice, a=nn.Linear(3, 3), b=nn.Linear(3, 3)),
    "tied_embedding_head": tied,
    "raw_parameters": lambda: Net(
        lambda m, x: m.b((m.a(x) + m.pos).tanh().mean(1)) * m.temperature,
        a=nn.Linear(3, 4), b=nn.Linear(4, 3), pos=nn.Parameter(torch.zeros(3, 4)),
        temperature=nn.Parameter(torch.zeros(())),
    ),
}  # fmt: skip
NETS["deep_linear_expand"] = lambda: Net(
    lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 3), c=nn.Linear(3, 2)
)


@cache
def golden() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    with np.load(FILE) as data:
        for key in data.files:
            case, _, rest = key.partition("/")
            value = data[key]
            cases.setdefault(case, {})[rest] = (
                str(value)
                if value.dtype.kind == "U" and not value.shape
                else (value if value.dtype.kind == "U" else torch.from_numpy(value))
            )
    return cases


def golden_model(name: str) -> nn.Module:
    """The net with the file's parameters, in double precision."""
    model = NETS[name]().double()
    prefix = "param/"
    state = {key.removeprefix(prefix): value for key, value in golden()[name].items() if key.startswith(prefix)}
    missing = model.load_state_dict(state, strict=False)
    buffers = {key for key, _ in model.named_buffers()}
    assert set(missing.missing_keys) <= {*buffers, "head.weight"}
    assert not missing.unexpected_keys
    return model
