"""`KFAC.explain`: every parameter once, with what really serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC
from kfacore.nest import tensors_of
from kfacore.optim.explain import Explanation, Row

TOKENS = torch.randint(0, 30, (6, 5), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """One of everything: tied, plain, sliced, normed, raw, frozen, empty."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.down(torch.tanh(self.up(h)))
        h = h + self.att(h, h, h)[0]
        z: Tensor = self.head(self.drop(self.frozen(self.norm(h))) * self.scale)
        return z


def by_name(found: Explanation) -> dict[str, Row]:
    return {row.parameter: row for row in found.rows}


def covered(model: nn.Module, found: Explanation) -> Iterator[tuple[str, int]]:
    """Rows of the first dimension that are told of each parameter."""
    for name, parameter in model.named_parameters():
        rows = [row.parameter for row in found.rows if row.parameter.split("[")[0] == name]
        if rows == [name]:
            yield name, len(parameter)
            continue
        slices = [row.split("[")[1].rstrip("]").split(":") for row in rows]
        indices = [i for a, b in slices for i in range(int(a), int(b))]
        assert len(indices) == len(set(indices)), rows
        yield name, len(indices)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag", "diagonal"])
def test_every_parameter_is_there_once(approx: str, steps: int) -> None:
    model = Net()
    opt = KFAC(model, likelihood="categorical", approx=approx)
    for _ in range(steps):
        opt.step(TOKENS, TOKENS)
    found = opt.explain()
    assert dict(covered(model, found)) == {name: len(p) for name, p in model.named_parameters()}
    rows = by_name(found)
    assert rows["emb.weight"].kind == "tied"
    assert "emb and head" in rows["emb.weight"].why
    assert (rows["up.weight"].kind, rows["up.weight"].d_in, rows["up.weight"].d_out) == ("kron", 9, 16)
    assert rows["up.weight"].block == rows["up.bias"].block == "up"
    assert rows["up.weight"].served_by == approx
    assert rows["norm.bias"].kind == "full"
    assert (rows["scale"].kind, rows["scale"].served_by) == ("diagonal", approx if approx == "diagonal" else "built-in")
    assert "no layer type reads scale of Net" in rows["scale"].why
    assert rows["att.in_proj_weight[8:16]"].block == "att.k"
    assert rows["frozen.weight"].kind == "frozen"
    assert rows["nothing"].kind == "empty"
    assert json.loads(json.dumps(found.as_dict()))["parameters"][0]["parameter"] == found.rows[0].parameter
    text = str(found)
    assert all(row.parameter in text for row in found.rows)


def test_before_the_first_step_nothing_is_claimed_of_paths() -> None:
    opt = KFAC(Net(), likelihood="categorical", approx="tridiag")
    rows = by_name(opt.explain())
    assert rows["up.weight"].path == "fast or general"
    assert rows["emb.weight"].path == "general"
    assert rows["up.weight"].alone == "known after the first step"
    assert not opt.explain().facts.seen
    assert "found out in the first step" in str(opt.explain())


def test_an_mlp_is_fast_and_a_chain() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = KFAC(model, likelihood="categorical", approx="tridiag")
    opt.step(torch.randn(8, 5), torch.randint(0, 3, (8,)))
    found = opt.explain()
    assert {row.path for row in found.rows} == {"fast"}
    assert by_name(found)["2.weight"].coupled == ("0", "4")
    assert (found.facts.way, found.facts.cut) == ("known products", True)
    assert not any(row.why for row in found.rows)


def test_couplings_and_reasons_for_none() -> None:
    opt = KFAC(Net(), likelihood="categorical", approx="tridiag")
    opt.step(TOKENS, TOKENS)
    rows = by_name(opt.explain())
    pairs = {(a, b) for a, b in opt.preconditioner.joined.coupled}  # type: ignore[union-attr]
    names = [layer.info.name for layer in opt.linearizer.layers]
    for row in rows.values():
        told = {tuple(sorted((names.index(row.block), names.index(each)))) for each in row.coupled}
        assert told == {pair for pair in pairs if row.block and names.index(row.block) in pair}
        assert bool(row.coupled) != bool(row.alone) or not row.block
    assert "built in" in rows["norm.weight"].alone
    assert all(not row.alone for row in KFAC(Net(), likelihood="categorical").explain())


def test_draws_mixing_and_cuts_are_told() -> None:
    opt = KFAC(Net(dropout=0.3), likelihood="categorical")
    opt.step(TOKENS, TOKENS)
    facts = opt.explain().facts
    assert (facts.seen, facts.cut, facts.mixes) == (True, False, False)
    assert facts.draws
    assert "draws" in facts.why_whole
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    opt = KFAC(model, likelihood="categorical")
    opt.step(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    facts = opt.explain().facts
    assert (facts.cut, facts.mixes, facts.way) == (False, True, "forward")
    assert "whole mini-batch" in str(opt.explain())


def test_wide_sides_and_unused_blocks() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(4, 20), nn.Linear(20, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(torch.tanh(self.a(x)))
            return z

    opt = KFAC(Two(), likelihood="categorical", approx={"kind": "blockdiag", "max_dim": 10})
    opt.step(torch.randn(6, 4), torch.randint(0, 3, (6,)))
    rows = by_name(opt.explain())
    wide = rows["a.weight"]
    assert (wide.input_side, wide.output_side, wide.served_by) == ("full", "diagonal", "built-in")
    assert "max_dim = 10" in wide.why
    assert rows["b.weight"].input_side == "diagonal"
    assert rows["spare.weight"].path == "not used"


def test_lazy_models_are_told_after_the_first_step() -> None:
    opt = KFAC(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2)), likelihood="categorical")
    assert by_name(opt.explain())["0.weight"].kind == "lazy"
    opt.step(torch.randn(6, 3), torch.randint(0, 2, (6,)))
    assert by_name(opt.explain())["0.weight"].d_in == 4


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag", "diagonal", "exact"])
def test_memory_is_that_of_the_tensors(approx: str) -> None:
    model: nn.Module = Net() if approx != "exact" else nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = TOKENS if approx != "exact" else torch.randn(6, 5)
    y = TOKENS if approx != "exact" else torch.randint(0, 3, (6,))
    opt = KFAC(model, likelihood="categorical", approx=approx)
    before = opt.explain().memory
    opt.step(x, y)
    after = opt.explain().memory
    assert opt.preconditioner is not None
    assert after.moments == held(moments(opt))
    assert before.moments == pytest.approx(after.moments, rel=0.2)
    assert after.factors == pytest.approx(held(opt.preconditioner.in_use.state_dict()), rel=0.03)
    assert before.vectors == after.vectors
    blocks = {row.block: row.memory for row in opt.explain() if row.block}
    assert sum(each.vectors for each in blocks.values()) == after.vectors


def moments(opt: KFAC) -> list[Any]:
    assert opt.preconditioner is not None
    state = opt.preconditioner.moments.state_dict()
    return [part["values"] for part in state.get("parts", [state])]


def held(state: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_of(state))
