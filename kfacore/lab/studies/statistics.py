"""What a study concludes from its seeds: means with intervals, paired differences, exact tests, times to a target.

Student's t and the survival function of Kaplan & Meier are scipy's, imported when they are asked for. Numbers that
would pretend to know more than the seeds say are not given at all: no interval below `MIN_INTERVAL` seeds, no test
below `MIN_TEST`. Imports no torch.

Sources: the exact sign-flip (permutation) test of Fisher (1935); Holm (1979), *A simple sequentially rejective
multiple test procedure*; Kaplan & Meier (1958) for runs that have not reached the target; Dolan & More (2002),
*Benchmarking optimization software with performance profiles*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "LEVEL",
    "MAX_TEST",
    "MIN_INTERVAL",
    "MIN_TEST",
    "Difference",
    "Profile",
    "Summary",
    "ToTarget",
    "holm",
    "paired_difference",
    "performance_profile",
    "sign_flip_p",
    "smallest_p",
    "summarise",
    "t_interval",
    "t_quantile",
    "to_target",
]

LEVEL = 0.95
"""Confidence of the intervals, when nobody asks for another."""

MIN_INTERVAL = 3
"""Seeds below which no interval is given: with two values its width is mostly the luck of the draw."""

MIN_TEST = 6
"""Pairs below which no sign-flip test is made: with five the smallest two-sided p is 1/16, so nothing can be found."""

MAX_TEST = 30
"""Pairs up to which all 2^n sign patterns are counted exactly; beyond it the interval says all there is to say."""


@dataclass(frozen=True)
class Summary:
    """One quantity over the seeds of a variant.

    Attributes:
        n: How many finite values there are.
        mean: Their mean; None without values.
        std: Sample standard deviation (divisor n - 1); None below two values.
        low: Lower end of the interval for the mean; None below `MIN_INTERVAL` values.
        high: Upper end.
        smallest: The smallest value.
        largest: The largest value.
    """

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class Difference:
    """A variant minus the base, over the seeds that both have.

    Attributes:
        n: Pairs.
        mean: Mean of the differences; None without pairs.
        std: Sample standard deviation of the differences; None below two pairs.
        low: Lower end of the t-interval of the mean difference; None below `MIN_INTERVAL` pairs.
        high: Upper end.
        p: Two-sided p of the exact sign-flip test; None below `MIN_TEST` or above `MAX_TEST` pairs.
        lost: Seeds for which only one of the two has a value, so that there is no pair.
    """

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    p: float | None
    lost: int


@dataclass(frozen=True)
class ToTarget:
    """What a variant needed to reach the target, over its seeds; who never got there counts as such.

    Attributes:
        n: Runs.
        reached: Runs that reached the target.
        median: Kaplan-Meier median; None where the estimated share of those still going never falls below a half.
        smallest: The smallest cost among those that reached it.
        largest: The largest among those, None unless all runs reached it: the others may need any amount.
    """

    n: int
    reached: int
    median: float | None
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class Profile:
    """Performance profile of one variant: a step function.

    Attributes:
        ratios: Sorted finite ratios r to the best of each instance, at least 1.
        shares: Share of instances with a ratio at most r, after each of `ratios`; ends below 1 where some were not
            solved.
        instances: Number of instances.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...]
    instances: int

    def at(self, ratio: float) -> float:
        """rho(ratio): the share of instances solved within `ratio` times the cost of the best."""
        position = int(np.searchsorted(np.asarray(self.ratios), ratio, side="right"))
        return self.shares[position - 1] if position else 0.0


def summarise(values: Sequence[float | None], level: float = LEVEL) -> Summary:
    """Mean, spread and interval of the finite values.

    Args:
        values: One value a seed; None and values that are not finite are left out of the numbers (and of n).
        level: Confidence of the interval.

    Returns:
        The summary.
    """
    found = _finite(values)
    if not found.size:
        return Summary(0, None, None, None, None, None, None)
    low, high = t_interval(found.tolist(), level)
    std = float(found.std(ddof=1)) if found.size > 1 else None
    return Summary(found.size, float(found.mean()), std, low, high, float(found.min()), float(found.max()))


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float | None, float | None]:
    """Student's interval for a mean: mean -+ t_{(1+level)/2, n-1} s / sqrt(n).

    Args:
        values: Finite values.
        level: Confidence, in (0, 1).

    Returns:
        Its ends; (None, None) below `MIN_INTERVAL` values.
    """
    n = len(values)
    if n < MIN_INTERVAL:
        return None, None
    array = np.asarray(values, dtype=np.float64)
    half: float = t_quantile(0.5 + level / 2.0, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    mean = float(array.mean())
    return mean - half, mean + half


def paired_difference(
    values: Mapping[int, float | None], base: Mapping[int, float | None], level: float = LEVEL
) -> Difference:
    """Variant minus base, seed by seed: what the seeds share (start, batches) cancels.

    Args:
        values: The variant's value by seed; None where a run failed or is missing.
        base: The base's.
        level: Confidence of the interval.

    Returns:
        The difference with interval and test, as far as the number of pairs allows.
    """
    left = {seed: value for seed, value in values.items() if _is_finite(value)}
    right = {seed: value for seed, value in base.items() if _is_finite(value)}
    seeds = sorted(left.keys() & right.keys())
    lost = len(left.keys() ^ right.keys())
    differences = [float(left[seed] or 0.0) - float(right[seed] or 0.0) for seed in seeds]
    summary = summarise(differences, level)
    p = sign_flip_p(differences) if MIN_TEST <= len(differences) <= MAX_TEST else None
    return Difference(summary.n, summary.mean, summary.std, summary.low, summary.high, p, lost)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p of the hypothesis that the differences are symmetric around 0.

    p = #{signs s in {-1, 1}^n : |sum_i s_i d_i| >= |sum_i d_i|} / 2^n. All 2^n patterns are counted, not drawn: the
    sums of each half of the pairs are listed and matched by binary search, O(2^(n/2) n) work.

    Args:
        differences: At most `MAX_TEST` finite differences.

    Returns:
        p, at least 2^(1-n).

    Raises:
        ValueError: There are none or too many.
    """
    n = len(differences)
    if not 1 <= n <= MAX_TEST:
        raise ValueError(f"the exact test takes 1 to {MAX_TEST} differences, found {n}")
    array = np.asarray(differences, dtype=np.float64)
    first, second = _signed_sums(array[: n // 2]), np.sort(_signed_sums(array[n // 2 :]))
    # Patterns whose sum equals the observed one must count although they are added up in another order.
    bound = abs(float(array.sum())) - 1e-12 * float(np.abs(array).sum())
    if bound <= 0.0:
        return 1.0
    above = second.size - np.searchsorted(second, bound - first, side="left")
    below = np.searchsorted(second, -bound - first, side="right")
    return math.ldexp(int(above.sum() + below.sum()), -n)


def smallest_p(pairs: int, comparisons: int) -> float:
    """The smallest p, after Holm's correction, that so many pairs can give at all: min(1, m 2^(1-n)).

    A study in which it exceeds 0.05 cannot find anything with this test, whatever the numbers are.

    Args:
        pairs: Pairs of each comparison (n).
        comparisons: Comparisons corrected for (m).
    """
    return min(1.0, comparisons * math.ldexp(1.0, 1 - pairs))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: the k-th smallest of m becomes max over j <= k of min(1, (m - j + 1) p_(j)).

    Args:
        p_values: The p of each comparison; None where there was no test, which does not count.

    Returns:
        The corrected p in the same order; all at or below alpha may be rejected together at error rate alpha.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = largest
    return corrected


def to_target(costs: Sequence[float], reached: Sequence[bool]) -> ToTarget:
    """Cost to reach a target where some runs have not reached it (right-censored).

    The median is that of Kaplan & Meier: S(t) = prod over event times t_j <= t of (1 - d_j / r_j), with r_j runs still
    going just before t_j and d_j reaching the target at it. The median is the first t with S(t) < 1/2; where S is
    exactly 1/2 between two event times it is the middle between them. If all runs reached the target this is the plain
    median, and if those that did not went on for longer than the others, the plain median with "never" as the largest
    of all values.

    Args:
        costs: Steps, seconds or cases of each run: at which it reached the target, or up to which it did not (infinity
            for a run that has come to its end, and never will).
        reached: Whether it did.

    Returns:
        The summary.
    """
    events = sorted(cost for cost, hit in zip(costs, reached, strict=True) if hit)
    median, half = None, None
    for time, survival in _survival(costs, reached) if events else ():
        if survival < 0.5 - 1e-12:
            median = time if half is None else 0.5 * (half + time)
            break
        if half is None and survival <= 0.5 + 1e-12:
            half = time
    everyone = len(events) == len(costs)
    return ToTarget(
        n=len(costs),
        reached=len(events),
        median=median,
        smallest=events[0] if events else None,
        largest=events[-1] if events and everyone else None,
    )


def performance_profile(costs: Mapping[str, Sequence[float]]) -> dict[str, Profile]:
    """Performance profiles, Dolan & More (2002), section 2: rho_s(tau) = share of instances p with r_{p,s} <= tau.

    r_{p,s} = t_{p,s} / min over variants of t_{p,s}.

    Args:
        costs: For each variant the cost of every instance, in the same order; infinity where it was not solved. A
            cost of 0 is the best there can be. An instance that nobody solved counts for all and is solved by none.

    Returns:
        The profile of each variant.

    Raises:
        ValueError: The variants have different numbers of instances.
    """
    counts = {len(values) for values in costs.values()}
    if len(counts) > 1:
        raise ValueError(f"all variants need the same instances, found {sorted(counts)}")
    if not costs:
        return {}
    table = np.array([list(values) for values in costs.values()], dtype=np.float64).reshape(len(costs), -1)
    instances = table.shape[1]
    best = table.min(axis=0) if instances else np.zeros(0)
    ratios = np.full_like(table, np.inf)
    solved = np.isfinite(table)
    positive = solved & (best > 0.0)
    np.divide(table, np.broadcast_to(best, table.shape), out=ratios, where=positive)
    ratios[solved & (table == 0.0)] = 1.0
    profiles = {}
    for name, row in zip(costs, ratios, strict=True):
        found = np.sort(row[np.isfinite(row)])
        values, counts_of = np.unique(found, return_counts=True)
        upto = np.cumsum(counts_of)
        profiles[name] = Profile(tuple(values.tolist()), tuple((upto / max(instances, 1)).tolist()), instances)
    return profiles


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t: the t with P(T <= t) = probability.

    Args:
        probability: In (0, 1).
        freedom: Degrees of freedom, at least 1.

    Returns:
        The quantile.

    Raises:
        ValueError: An argument is out of range.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # not `scipy.stats`, which takes a second to import

    if not 0.0 < probability < 1.0 or freedom < 1:
        raise ValueError(f"no t quantile for probability {probability} with {freedom} degrees of freedom")
    return float(stdtrit(freedom, probability))


def _survival(costs: Sequence[float], reached: Sequence[bool]) -> Iterator[tuple[float, float]]:
    """Each time with Kaplan & Meier's S after it, in order; a censored time has the S of the event before it.

    Scipy takes no infinite time. What is censored after the last event is at risk at all of them, as at that event.
    """
    from scipy.stats import CensoredData, ecdf  # type: ignore[import-untyped]

    times, events = np.asarray(costs, dtype=np.float64), np.asarray(reached, dtype=bool)
    found = ecdf(CensoredData.right_censored(np.minimum(times, times[events].max()), ~events)).sf
    return zip(found.quantiles.tolist(), found.probabilities.tolist(), strict=True)


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """sum_i s_i d_i for all 2^n patterns of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite(values: Sequence[float | None]) -> np.ndarray:
    return np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
