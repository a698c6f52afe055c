"""Factors of twenty nets from the layer types' rows, against values made of per-case Jacobians by plain loops.

``golden_layers.npz`` holds, for every net, its parameters, a mini-batch, and block by block the factors A and G of the
Fisher (exact, and for one draw of targets), its exact diagonal block, and F of norms. Only the Kronecker product of A
and G is determined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_modules import Conv1D
from layer_rows import Seen, exact_vectors, passes, watch
from torch import Tensor, nn

from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.roles import Likelihood

FILE = Path(__file__).parents[1] / "data" / "golden_layers.npz"
TOLERANCE = 1e-9

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


class Run:
    """A net of the file, its uses, and both kinds of backward passes."""

    def __init__(self, name: str) -> None:
        self.case = golden()[name]
        self.model = NETS[name]().double()
        prefix = "param/"
        state = {key.removeprefix(prefix): value for key, value in self.case.items() if key.startswith(prefix)}
        missing = self.model.load_state_dict(state, strict=False)
        buffers = {key for key, _ in self.model.named_buffers()}
        assert set(missing.missing_keys) <= {*buffers, "head.weight"}
        assert not missing.unexpected_keys
        self.z, self.seen = watch(self.model, lambda: self.model(self.case["x0"]))
        self.valid: Tensor | None = self.case.get("mask")
        self.S = float(self.case["S"])
        self.likelihood: Likelihood = {"categorical": Categorical, "gaussian": Gaussian}[self.case["likelihood"]]()

    @property
    def exact(self) -> dict[str, Tensor]:
        return passes(self.seen, self.z, exact_vectors(self.likelihood, self.z, self.valid))

    @property
    def drawn(self) -> dict[str, Tensor]:
        z, y = self.z.detach(), self.case["y_drawn"]
        flat = self.likelihood.residual(z.flatten(0, -2), y.flatten(0, len(z.shape) - 2)).view_as(z)
        if self.valid is not None:
            flat = flat * self.valid[..., None]
        return passes(self.seen, self.z, flat[None])


@cache
def run_of(name: str) -> Run:
    return Run(name)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def factors(seen: Seen, gradients: Tensor, valid: Tensor | None, S: float, reduce: bool) -> tuple[Tensor, Tensor]:
    """A (groups, d_in, d_in) and G (groups, d_out, d_out)."""
    X, counts = seen.rows(valid)
    g = gradients * counts[..., None, None]
    total = counts.sum()
    if reduce:
        X, g, total = X.mean(1, keepdim=True), g.sum(2, keepdim=True), torch.tensor(len(X))
    return torch.einsum("nrgi,nrgj->gij", X, X) / total, torch.einsum("knrgi,knrgj->gij", g, g) / S


def check_product(A: Tensor, G: Tensor, wanted_A: Tensor, wanted_G: Tensor) -> None:
    assert A.shape == wanted_A.shape
    assert G.shape == wanted_G.shape
    for parts in zip(A, G, wanted_A, wanted_G, strict=True):
        a, g, wanted_a, wanted_g = parts
        assert relative(torch.kron(g, a), torch.kron(wanted_g, wanted_a)) < TOLERANCE


def blocks_of(name: str) -> list[str]:
    kinds = {k.split("/")[1]: v for k, v in golden()[name].items() if k.startswith("block/") and k.endswith("/kind")}
    return [block for block, kind in kinds.items() if kind != "diagonal"]  # raw parameters belong to no layer


ALL = [(name, block) for name in NETS for block in blocks_of(name)]


def test_every_net_of_the_file_is_here() -> None:
    assert set(golden()) == set(NETS)
    assert len(NETS) == 20


@pytest.mark.parametrize("name", NETS)
def test_the_net_is_that_of_the_file(name: str) -> None:
    run = run_of(name)
    assert relative(run.z.detach(), run.case["z"]) < 1e-12
    found = {block for block, seen in run.seen.items() if seen.uses} - ({"head"} if name.startswith("tied") else set())
    assert found == set(blocks_of(name))


@pytest.mark.parametrize(("name", "block"), ALL, ids=[f"{n}/{b}" for n, b in ALL])
def test_factors(name: str, block: str) -> None:
    run = run_of(name)
    kind, seen = run.case[f"block/{block}/kind"], run.seen[block]
    for gradients, end in ((run.exact, ""), (run.drawn, "_drawn")):
        want = {k.rpartition("/")[2]: v for k, v in run.case.items() if k.startswith(f"block/{block}/")}
        if kind == "full":
            g = gradients[block].sum((2, 3)).flatten(0, 1)
            assert relative(g.T @ g / run.S, want[f"F{end}"]) < TOLERANCE
        elif kind == "tied":
            head = factors(run.seen["head"], gradients["head"], run.valid, run.S, reduce=False)
            check_product(*head, want["A"], want[f"G{end}"])
            embedding = factors(seen, gradients[block], run.valid, run.S, reduce=False)
            check_product(*embedding, want["A_emb"], want[f"G_emb{end}"])
        else:
            A, G = factors(seen, gradients[block], run.valid, run.S, reduce=kind.endswith("reduce"))
            check_product(A, G, want["A"], want[f"G{end}"])


@pytest.mark.parametrize(("name", "block"), ALL, ids=[f"{n}/{b}" for n, b in ALL])
def test_the_exact_block_of_the_fisher(name: str, block: str) -> None:
    """(1 / S) sum over cases, positions and terms of the case's gradient, which is the sum over rows of g abar^T."""
    run = run_of(name)
    seen = run.seen[block]
    if seen.block.kind == "full" or name.startswith("tied"):
        return
    X, counts = seen.rows(run.valid)
    g = run.exact[block] * counts[..., None, None]
    rows = torch.einsum("knrgo,nrgi->kgoi", g, X)  # one case a pass
    for group in range(seen.block.groups):
        each = rows[:, group].flatten(1)
        F = each.T @ each / run.S
        i, j = torch.tril_indices(len(F), len(F))
        assert relative(F[i, j], run.case[f"block/{block}/fisher{group}"]) < TOLERANCE
