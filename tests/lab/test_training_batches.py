from __future__ import annotations

import math

import pytest
import torch

from kfacore.errors import ConfigError
from kfacore.lab.training.batches import BatchSampler, BatchSchedule, derive_seed
from kfacore.roles import Split


def test_exponential_schedule_follows_the_formula():
    schedule = BatchSchedule("exponential", 60_000, 1000, 500)
    for k in (2, 50, 123, 499):
        assert schedule.size(k) == math.floor(1000 * 60 ** ((k - 1) / 499))
    assert schedule.size(1) == 1000
    assert schedule.size(500) == schedule.size(501) == schedule.size(10_000) == 60_000


@pytest.mark.parametrize("cases", [7, 1000, 20_000, 60_000, 103_500])
@pytest.mark.parametrize("target", [1, 2, 3, 500])
def test_exponential_schedule_ends_exactly_and_never_shrinks(cases, target):
    schedule = BatchSchedule("exponential", cases, 7, target)
    sizes = [schedule.size(k) for k in range(1, target + 3)]
    assert sizes == sorted(sizes)
    assert sizes[target - 1 :] == [cases] * 3


def test_floor_is_immune_to_rounding():
    # 10 * 1000^(1/3) is 100 in exact arithmetic and 99.99999999999997 in floating point
    assert 10 * 1000 ** (1 / 3) < 100
    assert BatchSchedule("exponential", 10_000, 10, 4).size(2) == 100


def test_small_data_is_used_whole():
    assert BatchSchedule("exponential", 300, 1000, 500).size(1) == 300
    assert BatchSchedule("constant", 300, 1000, 500).size(9) == 300


def test_constant_schedule():
    assert {BatchSchedule("constant", 60_000, 256, 500).size(k) for k in (1, 2, 500, 9999)} == {256}


@pytest.mark.parametrize(("cases", "start", "target"), [(0, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_numbers_below_one_are_refused(cases, start, target):
    with pytest.raises(ConfigError, match="at least 1"):
        BatchSchedule("constant", cases, start, target)


def _sampler(start=10, seed=0, cases=50, targets=None):
    inputs = torch.arange(cases * 2.0).reshape(cases, 2)
    split = Split(inputs, inputs if targets is None else targets)
    return BatchSampler(split, BatchSchedule("constant", cases, start, 1), seed)


def test_cases_are_drawn_without_replacement():
    for step in range(1, 6):
        indices = _sampler(start=40).indices(step)
        assert len(indices) == len(set(indices.tolist())) == 40


def test_a_batch_depends_on_seed_step_and_size_alone():
    one, other = _sampler(), _sampler()
    later = [other.indices(k) for k in (1, 2, 3)][2]
    assert torch.equal(one.indices(3), later)
    assert not torch.equal(one.indices(3), one.indices(4))
    assert not torch.equal(one.indices(3), _sampler(seed=1).indices(3))
    assert torch.equal(_sampler(start=20).indices(3)[:10], later)


def test_every_case_is_drawn_about_equally_often():
    sampler = _sampler()
    counts = torch.zeros(50)
    for step in range(1, 1001):
        counts[sampler.indices(step)] += 1
    # binomial(1000, 0.2): five standard errors are 63
    assert (counts - 200).abs().max() < 63


def test_an_autoencoders_target_stays_the_same_tensor():
    batch = _sampler().batch(1)
    assert batch.targets is batch.inputs
    assert torch.equal(batch.inputs, _sampler().split.inputs[_sampler().indices(1)])


def test_labels_follow_their_cases():
    batch = _sampler(targets=torch.arange(50)).batch(2)
    assert torch.equal(batch.inputs[:, 0], 2.0 * batch.targets)


def test_seeds_differ_by_purpose_and_index():
    seeds = {derive_seed(s, p, i) for s in (0, 1) for p in ("batch", "model") for i in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "model") == derive_seed(0, "model")


def test_sizes_are_held() -> None:
    """Steps 1 to 10 have the size of step 1, 11 to 20 that of step 11; the target step has all cases all the same."""
    grows = BatchSchedule("exponential", 60_000, 500, 25)
    holds = BatchSchedule("exponential", 60_000, 500, 25, hold=10)
    firsts = [1] * 10 + [11] * 10 + [21] * 4
    assert [holds.size(k) for k in range(1, 25)] == [grows.size(k) for k in firsts]
    assert [holds.size(k) for k in (25, 26)] == [60_000, 60_000]
    assert len({grows.size(k) for k in range(1, 26)}) == 25
    with pytest.raises(ConfigError, match="hold must be at least 1, found 0"):
        BatchSchedule("constant", 10, 5, 5, hold=0)


def _passes(schedule, seed=0):
    inputs = torch.zeros(schedule.cases, 1)
    return BatchSampler(Split(inputs, inputs), schedule, seed, "epochs")


def test_a_pass_holds_every_case_once():
    sampler = _passes(BatchSchedule("constant", 50, 10, 1))
    for epoch in range(3):
        drawn = torch.cat([sampler.indices(5 * epoch + k) for k in range(1, 6)])
        assert sorted(drawn.tolist()) == list(range(50))


def test_a_growing_batch_that_no_longer_fits_begins_a_new_pass():
    schedule = BatchSchedule("exponential", 1000, 100, 12)
    sampler, left, passes = _passes(schedule), 0, 0
    for step in range(1, 15):
        size = schedule.size(step)
        if size > left:
            left, seen, passes = schedule.cases, set(), passes + 1
        indices = sampler.indices(step).tolist()
        assert len(indices) == len(set(indices)) == size
        assert not seen & set(indices)
        seen |= set(indices)
        left -= size
    assert passes == 8  # 100 to 231 cases, 284 and 351, 432 and 533, then a pass for each batch
    assert sampler.place(14) == (passes - 1, 0)


def test_passes_depend_on_seed_and_step_alone():
    schedule = BatchSchedule("exponential", 200, 20, 30)
    one = _passes(schedule)
    batches = [one.indices(k) for k in range(1, 31)]
    for k in (30, 7, 8, 1):
        assert torch.equal(_passes(schedule).indices(k), batches[k - 1])
        assert torch.equal(one.indices(k), batches[k - 1])
    assert not torch.equal(_passes(schedule, seed=1).indices(1), batches[0])
    first, second = (set(_passes(BatchSchedule("constant", 200, 200, 1)).indices(k).tolist()) for k in (1, 2))
    assert first == second
    assert not torch.equal(_passes(BatchSchedule("constant", 200, 200, 1)).indices(1), batches[-1])
