"""Running averages: formula, first estimate, scale, symmetry, state."""

from __future__ import annotations

from itertools import pairwise

import dense
import pytest
import torch

from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.errors import ConfigError
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block, share_of
from kfacore.roles.moment import Moments

KINDS = (InputFactor, OutputFactor, InputCross, OutputCross)
LAYERS = [Block("a", 4, 3, True), Block("b", 4, 2, True), Block("c", 2, 5, False)]
Float = torch.float64


def samples(n: int, passes: int = 1, seed: int = 0) -> list[LayerSamples]:
    return [
        LayerSamples(
            dense.randn(n, layer.d_in, seed=10 * seed + i), dense.randn(passes, n, layer.d_out, seed=99 * seed - i)
        )
        for i, layer in enumerate(LAYERS)
    ]


def fresh(dtype: torch.dtype = Float) -> Moments:
    return Moments(KINDS, LAYERS, torch.zeros((), dtype=dtype))


def estimate(s: list[LayerSamples]) -> dict[type, list[torch.Tensor]]:
    """The same second moments, one case and one pass at a time."""
    factors = dense.Kronecker.of(s)
    count = range(len(s))
    return {
        InputFactor: [factors.A[i][i] for i in count],
        OutputFactor: [factors.G[i][i] for i in count],
        InputCross: [factors.A[i][j] for i, j in pairwise(count)],
        OutputCross: [factors.G[i][j] for i, j in pairwise(count)],
    }


@pytest.mark.parametrize("passes", [1, 4])
def test_first_estimate_is_taken_whole(passes: int) -> None:
    moments = fresh()
    for values in (moments[kind] for kind in KINDS):
        for value in values:
            value.fill_(torch.nan)  # nothing that was there before may show through
    s = samples(6, passes)
    moments.update(s, 0.95)
    for kind, wanted in estimate(s).items():
        for value, w in zip(moments[kind], wanted, strict=True):
            assert dense.relative(value, w) < 1e-14


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
def test_running_average(decay: float) -> None:
    moments, reference = fresh(), None
    for k in range(1, 31):
        s = samples(3 + k % 4, seed=k)
        moments.update(s, decay)
        new, f = estimate(s), min(1 - 1 / k, decay)
        if reference is None:
            reference = new
        else:
            reference = {
                kind: [f * old + (1 - f) * x for old, x in zip(reference[kind], new[kind], strict=True)]
                for kind in KINDS
            }
        assert moments.updates == k
    assert reference is not None
    for kind in KINDS:
        for value, wanted in zip(moments[kind], reference[kind], strict=True):
            assert dense.relative(value, wanted) < 1e-12


def test_early_average_is_the_plain_mean() -> None:
    """f = 1 - 1/k weighs the first estimates equally."""
    moments, seen = fresh(), []
    for k in range(1, 8):
        s = samples(5, seed=k)
        seen.append(estimate(s)[InputFactor][0])
        moments.update(s, 0.95)
    assert dense.relative(moments[InputFactor][0], torch.stack(seen).mean(0)) < 1e-13


@pytest.mark.parametrize("repeats", [1, 100])
def test_scale_does_not_depend_on_the_batch_size(repeats: int) -> None:
    """Ten cases, and the same ten a hundred times over: the very same statistics."""
    once = samples(10)
    many = [LayerSamples(s.inputs.repeat(repeats, 1), s.gradients.repeat(1, repeats, 1)) for s in once]
    small, large = fresh(), fresh()
    small.update(once, 0.95)
    large.update(many, 0.95)
    for kind in KINDS:
        for a, b in zip(small[kind], large[kind], strict=True):
            assert dense.relative(a, b) < 1e-12


def test_expected_scale_of_batches_of_10_and_1000() -> None:
    """Independent draws: the mean over many small batches meets one large batch."""
    traces = {}
    for n, count in ((10, 200), (1000, 2)):
        total = 0.0
        for seed in range(count):
            moments = fresh()
            moments.update(samples(n, seed=seed + 7 * n), 0.95)
            total += float(moments[InputFactor][0].trace() + moments[OutputFactor][0].trace())
        traces[n] = total / count
    # 7 unit-variance coordinates; 2,000 cases give a standard error of sqrt(14 / 2000) = 0.084
    assert traces[10] == pytest.approx(7.0, abs=5 * 0.084)
    assert traces[1000] == pytest.approx(7.0, abs=5 * 0.084)


def test_passes_are_summed_and_cases_averaged() -> None:
    one = samples(4)
    doubled = [LayerSamples(s.inputs, s.gradients.repeat(3, 1, 1)) for s in one]
    a, b = fresh(), fresh()
    a.update(one, 0.95)
    b.update(doubled, 0.95)
    assert dense.relative(b[OutputFactor][1], 3 * a[OutputFactor][1]) < 1e-14
    assert dense.relative(b[OutputCross][1], 3 * a[OutputCross][1]) < 1e-14
    assert torch.equal(a[InputFactor][1], b[InputFactor][1])


def test_float32_averages_stay_float32() -> None:
    moments = fresh(torch.float32)
    moments.update([LayerSamples(s.inputs.float(), s.gradients.float()) for s in samples(5)], 0.95)
    assert {value.dtype for kind in KINDS for value in moments[kind]} == {torch.float32}


def test_snapshots_do_not_move() -> None:
    moments = fresh()
    moments.update(samples(5), 0.95)
    copy = moments.snapshot(OutputCross)
    kept = [value.clone() for value in copy]
    moments.update(samples(5, seed=1), 0.95)
    assert all(torch.equal(a, b) for a, b in zip(copy, kept, strict=True))
    assert not torch.equal(moments[OutputCross][0], copy[0])


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    a, b = fresh(), fresh()
    for k in range(4):
        a.update(samples(5, seed=k), 0.95)
    b.load_state_dict(a.state_dict())
    for moments in (a, b):
        moments.update(samples(5, seed=9), 0.95)
    for kind in KINDS:
        assert all(torch.equal(x, y) for x, y in zip(a[kind], b[kind], strict=True))
    assert a.updates == b.updates == 5


def test_state_of_other_moments_is_refused() -> None:
    other = Moments((InputFactor,), LAYERS, torch.zeros((), dtype=Float))
    with pytest.raises(ConfigError, match=r"saved statistics are InputCross, InputFactor, .*needs InputFactor"):
        other.load_state_dict(fresh().state_dict())


@pytest.mark.parametrize(
    ("cases", "share", "wanted"), [(100, 0.25, 25), (103, 0.25, 26), (1000, 0.125, 125), (10, 0.3, 3), (3, 0.125, 1)]
)
def test_share_of_cases(cases: int, share: float, wanted: int) -> None:
    assert share_of(cases, share) == wanted


@pytest.mark.parametrize(
    ("cases", "positions", "wanted"),
    [(8, 128, 4), (8, 1, 8), (300, 1, 250), (32, 50, 10), (64, 2, 64), (64, 128, 8), (8, 10**6, 4), (3, 128, 3)],
)
def test_least_cases_are_counted_in_positions(cases: int, positions: int, wanted: int) -> None:
    """And are four at least, unless fewer were wanted in the first place."""
    assert share_of(cases, 0.125, 250, positions) == wanted
    assert share_of(cases, 0.125, 1, positions) == share_of(cases, 0.125)
