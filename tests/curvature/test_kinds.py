"""Every kind of block against its dense matrix: factors from rows written out, damping, tempering, exact inverses."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from kinds import BLOCKS, CASES, ROWS, joined, samples
from torch import Tensor

from kfac_plugins.approx import BlockDiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfacore.curvature.joined import Joined, JoinedInverse
from kfacore.errors import NumericalError
from kfacore.plugin import PiRule
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block, Side
from kfacore.roles.inverse import Inverse

Float = torch.float64
DAMPED_BY_FACTORS = [name for name, block in BLOCKS.items() if block.kind in ("kron", "tied")]


def second(rows: Tensor, count: int, side: Side = Side.FULL) -> Tensor:
    """One row at a time."""
    found = torch.stack([torch.outer(row, row) for row in rows]).sum(0) / count
    return torch.diag(found.diagonal()) if side is Side.DIAGONAL else found


def damp(A: Tensor, G: Tensor, gamma: float, pi: PiRule | float, power: float = 1.0) -> Tensor:
    split = float(((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()) if pi == "layer" else float(pi or 1.0)
    return torch.kron(tempered(A, split * gamma, power), tempered(G, gamma / split, power))


def tempered(X: Tensor, shift: float, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(X + shift * torch.eye(len(X), dtype=X.dtype))
    return vectors @ torch.diag(shift * (values / shift) ** power) @ vectors.T


def factors(block: Block, s: LayerSamples) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of each group; of a tied block those of the head and of the embedding, each for V of (d_out, d_in)."""
    if block.kind == "tied":
        assert s.head is not None
        head_G = second(s.head.gradients.flatten(0, 1), CASES, block.output_side)
        words = torch.eye(6, dtype=Float)[s.inputs]
        emb = second(s.gradients.flatten(0, 1), CASES), second(words, len(words))
        return [(second(s.head.inputs, len(s.head.inputs)), head_G), emb]
    x = s.inputs if s.inputs.is_floating_point() else torch.eye(block.d_in, dtype=Float)[s.inputs]
    x, g = x.reshape(len(x), block.groups, -1), s.gradients.flatten(0, 1).reshape(-1, block.groups, block.d_out)
    return [
        (second(x[:, k], len(x), block.input_side), second(g[:, k], CASES, block.output_side))
        for k in range(block.groups)
    ]


def reference(block: Block, s: LayerSamples, gamma: float, pi: PiRule | float = "layer", power: float = 1.0) -> Tensor:
    if block.kind == "kron":
        return torch.block_diag(*[damp(A, G, gamma, pi, power) for A, G in factors(block, s)])
    if block.kind == "tied":
        (head, (G_emb, A_emb)), each = factors(block, s), gamma / math.sqrt(2)
        # Of the embedding pi belongs to the tokens' side, which stands on the left: G_emb (x) A_emb is damped as A, G.
        inverse_pi = pi if not isinstance(pi, float) else 1 / pi
        return damp(*head, each, pi, power) + damp(G_emb, A_emb, each, inverse_pi, power)
    rows = s.gradients.flatten(0, 1)
    if block.kind == "diagonal":
        return tempered(torch.diag(rows.square().sum(0) / CASES), gamma**2, power)
    rows = rows.reshape(len(rows), block.groups, -1)
    return torch.block_diag(*[tempered(second(rows[:, k], CASES), gamma**2, power) for k in range(block.groups)])


def inverse_of(blocks: list[Block], gamma: float, pi: PiRule = "layer", power: float = 1.0) -> Inverse:
    joint, moments = joined(blocks, power)
    moments.update([samples(block) for block in blocks], 0.95)
    return joint.damped(joint.factorise(moments), torch.tensor(gamma, dtype=Float), pi)


@pytest.mark.parametrize("power", [1.0, 0.7])
@pytest.mark.parametrize("name", BLOCKS)
def test_each_kind_is_its_dense_matrix(name: str, power: float) -> None:
    block = BLOCKS[name]
    for gamma in (0.05, 0.8):
        wanted = reference(block, samples(block), gamma, power=power)
        inverse = inverse_of([block], gamma, power=power)
        assert dense.relative(inverse.dense(inverse=False), wanted) < 1e-11
        assert dense.relative(inverse.dense(), torch.linalg.inv(wanted)) < 1e-9


def test_all_together_are_block_diagonal_and_survive_a_checkpoint() -> None:
    blocks = list(BLOCKS.values())
    wanted = torch.block_diag(*[reference(block, samples(block), 0.3) for block in blocks])
    joint, moments = joined(blocks)
    moments.update([samples(block) for block in blocks], 0.95)
    inverse = joint.damped(joint.factorise(moments), torch.tensor(0.3, dtype=Float), "layer")
    assert isinstance(inverse, JoinedInverse)
    assert dense.relative(inverse.dense(inverse=False), wanted) < 1e-12
    v = [dense.randn(*block.shape, seed=i) for i, block in enumerate(blocks)]
    again = joint.load_inverse(inverse.state_dict())
    out = [torch.empty_like(x) for x in v]
    again.solve_into(v, out)
    assert all(torch.equal(a, b) for a, b in zip(inverse.solve(v), out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inverse.multiply(v), again.multiply(v), strict=True))
    _, other = joined(blocks)
    other.load_state_dict(moments.state_dict())
    frozen = moments.frozen()
    for m in (moments, other):
        m.update([samples(block, seed=9) for block in blocks], 0.95)
    a, b, c = (
        joint.damped(joint.factorise(m), torch.tensor(0.3, dtype=Float), "layer") for m in (moments, other, frozen)
    )
    assert all(torch.equal(x, y) for x, y in zip(a.solve(v), b.solve(v), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(c.solve(v), inverse.solve(v), strict=True))


def test_net_pi_is_the_mean_over_all_products_of_the_net() -> None:
    names = ["plain", "groups", "raw", "tied"]
    blocks = [BLOCKS[name] for name in names]
    logs = []
    for block in (BLOCKS["plain"], BLOCKS["groups"]):
        pis = [((A.trace() / len(A)) / (G.trace() / len(G))).sqrt() for A, G in factors(block, samples(block))]
        logs.append(torch.stack(pis).log().mean())  # groups of one block count once
    head, (G_emb, A_emb) = factors(BLOCKS["tied"], samples(BLOCKS["tied"]))
    for A, G in (head, (A_emb, G_emb)):
        logs.append(0.5 * ((A.trace() / len(A)) / (G.trace() / len(G))).log())
    pi = float(torch.stack(logs).mean().exp())
    wanted = torch.block_diag(*[reference(block, samples(block), 0.3, pi) for block in blocks])
    assert dense.relative(inverse_of(blocks, 0.3, pi="net").dense(inverse=False), wanted) < 1e-11


@pytest.mark.parametrize("name", DAMPED_BY_FACTORS)
def test_without_pi_gamma_is_added_as_it_is(name: str) -> None:
    block = BLOCKS[name]
    wanted = reference(block, samples(block), 0.3, None)
    assert dense.relative(inverse_of([block], 0.3, pi=None).dense(inverse=False), wanted) < 1e-12


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "plain"])
def test_statistics_that_are_not_finite_name_the_block(name: str) -> None:
    block = BLOCKS[name]
    joint, moments = joined([block])
    s = samples(block)
    s.gradients[0, 0] = torch.nan
    moments.update([s], 0.95)
    with pytest.raises(NumericalError, match=f"^{block.name}: "):
        joint.damped(joint.factorise(moments), torch.tensor(0.3, dtype=Float), "layer")


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "plain"])
def test_single_precision_where_it_is_singular(name: str) -> None:
    """Rank-deficient factors, small damping, float32: finite, and a direction of descent."""
    block = BLOCKS[name]
    found = Joined(BlockDiagonal(BlockDiagonalConfig(power=1.0)), [block])
    moments = found.start(torch.zeros(()))
    s = samples(block, passes=1)
    head = (
        None if s.head is None else LayerSamples(s.head.inputs[:ROWS].float(), s.head.gradients[:, :ROWS].float(), ROWS)
    )
    rows = ROWS if block.kind in ("kron", "tied") else 1
    inputs = s.inputs[:rows] if not s.inputs.is_floating_point() else s.inputs[:rows].float()
    moments.update([LayerSamples(inputs, s.gradients[:, :rows].float(), s.positions, total=1, head=head)], 0.95)
    v = [dense.randn(*block.shape).float()]
    (u,) = found.damped(found.factorise(moments), torch.tensor(1e-2, dtype=Float), "layer").solve(v)
    assert u.dtype == torch.float32
    assert bool(torch.isfinite(u).all())
    assert float((u * v[0]).sum()) > 0
