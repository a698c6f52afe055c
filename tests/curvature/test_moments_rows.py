"""Statistics beyond one row a case: parts of a mini-batch, counts, several processes, blocks that saw nothing."""

from __future__ import annotations

from dataclasses import replace

import dense
import pytest
import torch
from kinds import BLOCKS, CASES, ROWS, joined, samples

from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, add_products
from kfacore.errors import ConfigError, UnsupportedModelError
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block, Side
from kfacore.roles.moment import Moments
from kfacore.roles.samples import Samples, mean_diagonal, rows_a_case

Float = torch.float64
ALL = list(BLOCKS.values())


def batch(seed: int = 0) -> list[LayerSamples]:
    return [samples(block, seed) for block in ALL]


def cut(s: LayerSamples, start: int, stop: int) -> LayerSamples:
    """Cases start..stop-1, with S of their own."""
    rows = ROWS if s.inputs.numel() else 1
    part = slice(start * rows, stop * rows)
    head = None if s.head is None else cut(s.head, start, stop)
    inputs = s.inputs[part] if s.inputs.numel() else s.inputs
    return replace(s, inputs=inputs, gradients=s.gradients[:, part], total=stop - start, head=head)


def values(moments: Moments) -> list[torch.Tensor]:
    found = []
    for part in moments.state_dict()["parts"]:
        found += [value for kind in part["values"].values() for value in kind]
    return found


def close(a: Moments, b: Moments, limit: float = 1e-13) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        assert dense.relative(x, y) < limit


def test_parts_of_a_mini_batch_are_the_mini_batch() -> None:
    (_, whole), (_, parts) = joined(ALL), joined(ALL)
    for seed in range(3):
        whole.update(batch(seed), 0.6)
        for start, stop in ((0, 1), (1, 3), (3, CASES)):
            parts.add([cut(s, start, stop) for s in batch(seed)])
        parts.commit(0.6)
    assert whole.updates == parts.updates == 3
    close(parts, whole)


def test_nothing_added_is_no_update() -> None:
    _, moments = joined(ALL)
    moments.update(batch(), 0.9)
    kept = values(moments)
    moments.commit(0.9)
    assert moments.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(values(moments), kept, strict=True))


def test_sums_of_two_processes_are_those_of_one() -> None:
    """The second one has no case for the last block."""
    (_, one), (_, first), (_, second) = joined(ALL), joined(ALL), joined(ALL)
    for seed in range(3):
        s = batch(seed)
        one.update([*s[:-1], replace(cut(s[-1], 0, 2), total=CASES)], 0.6)
        first.add([cut(x, 0, 2) for x in s])
        second.add([*(cut(x, 2, CASES) for x in s[:-1]), None])
        summed = [a + b for a, b in zip(first.pending(), second.pending(), strict=True)]
        for moments in (first, second):
            moments.load_pending([tensor.clone() for tensor in summed])
            moments.commit(0.6)
    close(first, one)
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(second), strict=True))


def test_a_process_that_saw_nothing_takes_part() -> None:
    (_, one), (_, first), (_, second) = joined(ALL), joined(ALL), joined(ALL)
    one.update(batch(), 0.6)
    first.add(batch())
    summed = [a + b for a, b in zip(first.pending(), second.pending(), strict=True)]
    second.load_pending(summed)
    second.commit(0.6)
    close(second, one)


def test_a_block_that_saw_nothing_keeps_its_average_and_its_count() -> None:
    (_, moments), (_, alone) = joined(ALL), joined(ALL)
    for seed in range(5):
        s: Samples = [x if (seed + i) % 3 else None for i, x in enumerate(batch(seed))]
        moments.update(s, 0.9)
    for i in range(len(ALL)):
        for seed in range(5):
            if (seed + i) % 3:
                alone.update([x if j == i else None for j, x in enumerate(batch(seed))], 0.9)
    close(moments, alone)


def test_counts_on_the_device_give_the_same_averages() -> None:
    """What the host does not know it does not wait for; a batch without a row changes nothing."""
    blocks = [BLOCKS["plain"], BLOCKS["embedding"]]
    (_, known), (_, told) = joined(blocks), joined(blocks)
    for seed in range(4):
        s = [samples(block, seed) for block in blocks]
        known.update(s, 0.6)
        count, total = torch.tensor(CASES * ROWS), torch.tensor(CASES)
        told.update([replace(x, count=count, total=total) for x in s], 0.6)
        nothing = [replace(x, gradients=0 * x.gradients, count=torch.tensor(0), total=torch.tensor(0)) for x in s]
        told.update(nothing, 0.6)
    close(told, known)
    state = told.state_dict()
    _, again = joined(blocks)
    again.load_state_dict(state)
    for moments in (told, again):
        moments.update([samples(block, 7) for block in blocks], 0.6)
    assert all(torch.equal(a, b) for a, b in zip(values(told), values(again), strict=True))


def test_the_first_estimate_counts_alone_whatever_was_there() -> None:
    for device_count in (False, True):
        _, moments = joined(ALL)
        _, fresh = joined(ALL)
        for part in moments.each:  # type: ignore[attr-defined]
            for kind in part.kinds:
                for value in part[kind]:
                    value.fill_(torch.nan)
        s = batch()
        if device_count:
            s = [replace(x, total=torch.tensor(CASES)) for x in s]
        moments.update(s, 0.9)
        fresh.update(batch(), 0.9)
        close(moments, fresh)


def test_rows_that_do_not_count_leave_frequencies_and_means() -> None:
    block = Block("emb", 4, 2, False, input_side=Side.DIAGONAL)
    tokens = torch.tensor([1, -1, 3, 1])
    moments = Moments((InputFactor,), [block], torch.zeros((), dtype=Float))
    moments.update([LayerSamples(tokens, dense.randn(1, 4, 2), count=3)], 0.9)
    assert torch.equal(moments[InputFactor][0], torch.tensor([0.0, 2 / 3, 0.0, 1 / 3], dtype=Float))


def test_pairs_are_those_given() -> None:
    blocks = [Block(name, d, d + 1, False) for name, d in (("a", 2), ("b", 3), ("c", 4))]
    n = CASES * ROWS
    s = [
        LayerSamples(dense.randn(n, b.d_in, seed=i), dense.randn(2, n, b.d_out, seed=i), ROWS)
        for i, b in enumerate(blocks)
    ]
    moments = Moments((InputCross, OutputCross), blocks, torch.zeros((), dtype=Float), [(2, 0), (0, 1)])
    moments.update(s, 0.9)
    for (i, j), Ax, Gx in zip(moments.pairs, moments[InputCross], moments[OutputCross], strict=True):
        assert dense.relative(Ax, s[i].inputs.T @ s[j].inputs / n) < 1e-13
        assert dense.relative(Gx, torch.einsum("kri,krj->ij", s[i].gradients, s[j].gradients) / CASES) < 1e-13
    with pytest.raises(UnsupportedModelError, match="a and b cannot be coupled: the first has 15 rows, the second 12"):
        moments.update([s[0], cut(s[1], 0, 4), s[2]], 0.9)


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.kind == "kron"])
@pytest.mark.parametrize("size", [3, 40])
def test_mean_diagonal_sums_the_rows_of_a_case(name: str, size: int) -> None:
    """By products of rows, and by sums of matrices where those are smaller."""
    block = BLOCKS[name]
    s = samples(block)
    if size == 40 and s.inputs.is_floating_point():  # as one case of many rows
        groups = s.inputs.shape[1:-1]
        s = LayerSamples(
            dense.randn(2 * size, *groups, block.d_in), dense.randn(2, 2 * size, *groups, block.d_out), size
        )
    R = s.positions
    x = s.inputs if s.inputs.is_floating_point() else torch.eye(block.d_in, dtype=Float)[s.inputs]
    x, g = x.reshape(s.cases, R, block.groups, -1), s.gradients.reshape(2, s.cases, R, block.groups, -1)
    total = 0.0
    for k in range(2):
        for n in range(s.cases):
            for group in range(block.groups):
                M = sum(torch.outer(g[k, n, r, group], x[n, r, group]) for r in range(R))
                total += float(M.square().sum())
    wanted = total / s.cases / block.size
    assert float(mean_diagonal([s], [block])) == pytest.approx(wanted, rel=1e-12)
    assert float(mean_diagonal([None, s], [ALL[0], block])) == pytest.approx(wanted, rel=1e-12)


def test_rows_a_case_are_those_that_parameters_work_on() -> None:
    plain, other = Block("a", 4, 3, True), Block("b", 2, 5, False)
    one = LayerSamples(dense.randn(6, plain.d_in), dense.randn(1, 6, 3))
    many = LayerSamples(dense.randn(6 * 7, other.d_in), dense.randn(1, 6 * 7, 5), 7)
    assert rows_a_case([one], [plain]) == 1.0
    wanted = (plain.size + 7 * other.size) / (plain.size + other.size)
    assert rows_a_case([one, many], [plain, other]) == wanted
    assert rows_a_case([one, None], [plain, other]) == 1.0
    assert rows_a_case([None, None], [plain, other]) == 1.0
    words = BLOCKS["tied"]
    assert rows_a_case([samples(words)], [words]) == ROWS  # as head; as embedding it looks up
    looked_up = Block("emb", 6, 3, False, input_side=Side.DIAGONAL)
    assert rows_a_case([replace(samples(words), head=None)], [looked_up]) == 0.0


def test_mean_diagonal_of_other_kinds() -> None:
    full, raw, tied = BLOCKS["channels"], BLOCKS["raw"], BLOCKS["tied"]
    for block in (full, raw):
        s = samples(block)
        wanted = float(s.gradients.square().sum()) / CASES / block.size
        assert float(mean_diagonal([s])) == pytest.approx(wanted, rel=1e-12)
    s = samples(tied)
    assert s.head is not None
    emb = Block("emb", 6, 3, False, input_side=Side.DIAGONAL)
    parts = mean_diagonal([replace(s, head=None)], [emb]) + mean_diagonal([s.head])
    assert float(mean_diagonal([s], [tied])) == pytest.approx(float(parts), rel=1e-12)
    with pytest.raises(ConfigError, match="give mean_diagonal the blocks too"):
        mean_diagonal([s])


def test_mean_diagonal_without_cases_is_the_product_of_the_traces() -> None:
    block = BLOCKS["plain"]
    s = replace(samples(block), positions=None, total=CASES)
    A, G = s.inputs.T @ s.inputs / len(s.inputs), torch.einsum("kri,krj->ij", s.gradients, s.gradients) / CASES
    assert float(mean_diagonal([s])) == pytest.approx(float(A.trace() * G.trace()) / block.size, rel=1e-12)


@pytest.mark.parametrize("shape", [(3,), (10,), (2, 3)])
def test_narrow_factors_of_many_rows_keep_their_digits(shape: tuple[int, ...]) -> None:
    """Four fifths of the pixels are background: some libraries' products of them drift by 1e-3 in float32."""
    generator = torch.Generator().manual_seed(0)
    rows = 400_001
    x = torch.rand(rows, *shape, generator=generator)
    x[torch.rand(rows, *shape, generator=generator) < 0.8] = -0.4241
    value = torch.full((*shape, shape[-1]), torch.nan)
    add_products(value, x, x, 0.0, 1.0 / rows)
    groups = x.double().reshape(rows, -1, shape[-1])
    expected = torch.einsum("rgd,rge->gde", groups, groups).reshape(value.shape) / rows
    assert (value - expected).abs().max() < 1e-5 * expected.abs().max()
    before = value.clone()
    add_products(value, x, x, 0.5, 0.5 / rows)
    assert torch.allclose(value, before, rtol=1e-6)
