"""The statistics of a study against scipy, closed forms and cases computed by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from late import Late

from kfacore.lab.studies.statistics import (
    MAX_TEST,
    holm,
    paired_difference,
    performance_profile,
    sign_flip_p,
    smallest_p,
    summarise,
    t_interval,
    t_quantile,
    to_target,
)

stats = Late("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 200])
@pytest.mark.parametrize("probability", [0.5 + 1e-3, 0.6, 0.9, 0.975, 0.9995, 1 - 1e-6, 0.01])
def test_t_quantile(freedom, probability):
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


def test_t_quantile_by_hand():
    for p in (0.01, 0.6, 0.975, 1 - 1e-6):  # two degrees of freedom have a closed form
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)
    assert t_quantile(0.75, 1) == pytest.approx(1.0)  # the Cauchy distribution's quartile
    assert t_quantile(0.25, 1) == pytest.approx(-1.0)
    for probability, freedom in [(0.0, 3), (1.0, 3), (0.5, 0)]:
        with pytest.raises(ValueError, match="no t quantile"):
            t_quantile(probability, freedom)


def test_summary_by_hand():
    summary = summarise([1.0, None, 2.0, 6.0, math.nan, math.inf])
    assert (summary.n, summary.mean, summary.smallest, summary.largest) == (3, 3.0, 1.0, 6.0)
    assert summary.std == pytest.approx(math.sqrt(7.0))  # (4 + 1 + 9) / 2
    half = 4.302652729911275 * math.sqrt(7.0) / math.sqrt(3.0)  # t_{0.975, 2}
    assert (summary.low, summary.high) == pytest.approx((3.0 - half, 3.0 + half))


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_interval_is_that_of_scipy(level):
    values = np.random.default_rng(1).normal(3.0, 2.0, size=7)
    wanted = stats.t.interval(level, 6, loc=values.mean(), scale=stats.sem(values))
    assert t_interval(values.tolist(), level) == pytest.approx(wanted)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(5)
    samples = rng.normal(size=(2000, 4)).tolist()
    covered = sum(low <= 0.0 <= high for low, high in (t_interval(sample) for sample in samples))
    assert 0.935 < covered / 2000 < 0.965


@pytest.mark.parametrize(("values", "mean", "std"), [([], None, None), ([2.0], 2.0, None), ([1.0, 3.0], 2.0, 2**0.5)])
def test_fewer_than_three_values_have_no_interval(values, mean, std):
    summary = summarise(values)
    assert (summary.n, summary.mean) == (len(values), mean)
    assert summary.std == (None if std is None else pytest.approx(std))
    assert (summary.low, summary.high) == (None, None)


def test_paired_difference_is_that_of_scipy():
    rng = np.random.default_rng(2)
    base = rng.normal(10.0, 5.0, size=8)
    other = base + rng.normal(0.5, 0.4, size=8)  # the seeds matter far more than the variant
    found = paired_difference(dict(enumerate(other)), dict(enumerate(base)))
    wanted = stats.ttest_rel(other, base)
    interval = wanted.confidence_interval(0.95)
    assert found.n == 8
    assert found.mean == pytest.approx((other - base).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    exact = stats.permutation_test((other - base,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(exact.pvalue)


def test_pairs_are_matched_by_seed_and_lost_ones_counted():
    found = paired_difference({1: 5.0, 2: 7.0, 3: None, 4: math.nan, 9: 1.0}, {2: 4.0, 1: 4.0, 3: 3.0, 4: 2.0, 5: None})
    assert (found.n, found.mean, found.lost) == (2, 2.0, 3)  # seeds 3, 4 and 9 have one side only
    assert (found.low, found.p) == (None, None)
    assert paired_difference({1: None}, {1: None}).lost == 0
    assert paired_difference({}, {}).mean is None


def brute_force(differences):
    observed = abs(sum(differences))
    patterns = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9])
def test_sign_flip_counts_every_pattern(n):
    differences = np.random.default_rng(n).normal(0.4, 1.0, size=n).tolist()
    assert sign_flip_p(differences) == brute_force(differences)


def test_sign_flip_by_hand():
    assert sign_flip_p([0.1, 2.0, 3.0, 0.2, 5.0, 1.0]) == 2 / 64  # all of one sign
    assert sign_flip_p([-1.0, -1.0, -1.0]) == 2 / 8
    # +-1 +-2 +-4 +-8: the sums are all odd numbers from -15 to 15; observed 13
    assert sign_flip_p([-1.0, 2.0, 4.0, 8.0]) == 4 / 16
    assert sign_flip_p([1.0, -1.0, 2.0, -2.0, 0.0, 0.0]) == 1.0


def test_sign_flip_sees_ties_through_rounding():
    differences = [0.1, 0.2, 0.3, -0.1, -0.2, 0.7]  # other orders give the same sum but for the last bit
    assert sign_flip_p(differences) == brute_force(differences)
    assert sign_flip_p([0.1] * 10 + [-0.1] * 2) == pytest.approx(
        2 * sum(math.comb(12, k) for k in range(3)) / 2**12, abs=0
    )


def test_sign_flip_of_the_most_pairs_is_exact():
    n = MAX_TEST
    assert sign_flip_p([1.0] * n) == 2.0 ** (1 - n)
    assert sign_flip_p([1.0] * (n - 1) + [-1.0]) == (1 + n) * 2.0 ** (1 - n)
    for wrong in ([], [1.0] * (n + 1)):
        with pytest.raises(ValueError, match="differences, found"):
            sign_flip_p(wrong)
    assert paired_difference(dict.fromkeys(range(n + 1), 1.0), dict.fromkeys(range(n + 1), 0.5)).p is None


@pytest.mark.parametrize(("n", "tested"), [(5, False), (6, True)])
def test_the_test_starts_at_six_pairs(n, tested):
    found = paired_difference(dict.fromkeys(range(n), 2.0), dict.fromkeys(range(n), 1.0))
    assert (found.p is not None) == tested


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert holm([]) == []
    assert holm([None]) == [None]


def test_smallest_p():
    assert smallest_p(6, 1) == 2 / 64
    assert smallest_p(6, 11) == pytest.approx(11 / 32)
    assert smallest_p(3, 9) == 1.0
    # it is what Holm makes of comparisons that could not be clearer
    assert holm([sign_flip_p([1.0] * 6)] * 11)[0] == pytest.approx(smallest_p(6, 11))


@pytest.mark.parametrize("costs", [[3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [7.0], [2.0, 2.0, 5.0, 5.0]])
def test_all_reached_gives_the_plain_median(costs):
    found = to_target(costs, [True] * len(costs))
    assert (found.n, found.reached, found.median) == (len(costs), len(costs), np.median(costs))
    assert (found.smallest, found.largest) == (min(costs), max(costs))


@pytest.mark.parametrize(
    ("costs", "reached", "median", "largest"),
    [
        ([10.0, 20.0, 30.0, 100.0], [True, True, True, False], 25.0, None),  # the middle of 10 20 30 never
        ([10.0, 20.0, 100.0, 100.0], [True, True, False, False], None, None),  # half of them: not known
        ([10.0, 100.0, math.inf], [True, False, False], None, None),
        ([100.0], [False], None, None),
        ([], [], None, None),
        # one run stopped at 5, before anything could happen: 3 are at risk at 10, and S falls 1, 2/3, 1/3
        ([5.0, 10.0, 20.0, 30.0], [False, True, True, True], 20.0, None),
    ],
)
def test_censored_runs_by_hand(costs, reached, median, largest):
    found = to_target(costs, reached)
    assert (found.n, found.reached) == (len(costs), sum(reached))
    assert found.median == median
    assert found.largest == largest


def test_survival_is_the_product_over_events():
    rng = np.random.default_rng(4)
    for _ in range(40):
        costs, reached = rng.integers(1, 12, size=9).astype(float), rng.random(9) < 0.7
        costs[~reached & (rng.random(9) < 0.3)] = math.inf
        survival, left = {}, Fraction(1)
        for time in np.unique(costs[reached]):
            left *= 1 - Fraction(int((costs[reached] == time).sum()), int((costs >= time).sum()))
            survival[time] = left
        below = [t for t, s in survival.items() if 2 * s < 1]
        equal = [t for t, s in survival.items() if 2 * s == 1]
        expected = None if not below else (min(equal) + below[0]) / 2 if equal else below[0]
        assert to_target(costs.tolist(), reached.tolist()).median == expected


def test_profile_by_hand():
    inf = math.inf
    profiles = performance_profile({"a": [1.0, 10.0, 4.0, inf], "b": [2.0, 5.0, inf, inf], "c": [inf, 5.0, 4.0, inf]})
    assert profiles["a"].ratios == (1.0, 2.0)
    assert profiles["a"].shares == (0.5, 0.75)  # best of two, within twice the best of one more; the last nobody solved
    assert profiles["b"].ratios == (1.0, 2.0)
    assert profiles["b"].shares == (0.25, 0.5)
    assert profiles["c"].shares == (0.5,)
    assert [profiles["a"].at(tau) for tau in (0.5, 1.0, 1.9, 2.0, 99.0)] == [0.0, 0.5, 0.5, 0.75, 0.75]
    assert all(profile.instances == 4 for profile in profiles.values())


def test_profile_of_ties_zero_costs_and_nothing():
    profiles = performance_profile({"a": [0.0, 3.0], "b": [2.0, 3.0]})
    assert profiles["a"].shares == (1.0,)
    assert (profiles["b"].ratios, profiles["b"].shares) == ((1.0,), (0.5,))  # 2 is infinitely worse than 0
    missed = performance_profile({"a": [1.0, 2.0], "b": [math.inf, math.inf]})["b"]
    assert (missed.ratios, missed.shares, missed.at(9.0)) == ((), (), 0.0)
    assert performance_profile({}) == {}
    assert performance_profile({"a": []})["a"].at(1.0) == 0.0
    with pytest.raises(ValueError, match="same instances"):
        performance_profile({"a": [1.0], "b": []})
