r"""When a run has diverged: three verdicts on its losses.

Two kinds of losses are known of a run: that of every step's mini-batch before the step, l_1 to l_T, and a few
evaluations on the whole training set, L_0 (before the first step) to L_E (at the end).

``nan``: any of them is not finite, or the model is not finite at the end.

``doubled``: an evaluation after more than ten steps is at least twice the evaluation before it, and above a thousandth
of L_0.

``rose``: the run ends above its best, in one of two ways.

* By its mini-batches (``batches_rose``): the mean of the last ten l is above 1.05 times the smallest mean of any ten
  consecutive l by more than twice the standard error of that difference, sqrt(s_last^2 + (1.05 s_best)^2), where
  s = (standard deviation of those ten) / sqrt(10), and by more than rounding, a millionth of L_0. Among thousands of
  windows the best one is a lucky one, which its own ten losses cannot show; so the whole set must agree: L_E is above
  1.05 times the smallest L (``whole_rose``).
* By the whole set alone: L_E is at least twice the smallest L, and above a thousandth of L_0. Noise of small
  mini-batches may hide that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["Evaluation", "Verdict", "judge"]

WINDOW = 10
FACTOR = 1.05
ERRORS = 2.0
FLOOR = 1e-3
ROUNDING = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """Losses on whole sets.

    Attributes:
        seconds: Processor seconds that the steps before it took.
        step: Number of steps before it.
        train: Training loss.
        test: Test loss.
    """

    seconds: float
    step: int
    train: float
    test: float


@dataclass(frozen=True)
class Verdict:
    """See the module. The last three say what ``batches_rose`` was found from."""

    nan: bool
    doubled: bool
    rose: bool
    batches_rose: bool
    whole_rose: bool
    last_ten: float
    best_ten: float
    noise: float


def judge(losses: Sequence[float], evaluations: Sequence[Evaluation], *, finite_model: bool) -> Verdict:
    """The verdicts on one run's losses; those that compare are made on what is finite."""
    whole = [evaluation.train for evaluation in evaluations]
    nan = not (finite_model and all(map(math.isfinite, losses)) and all(map(math.isfinite, whole)))
    first, end = whole[0], whole[-1]
    best = min((loss for loss in whole if math.isfinite(loss)), default=math.inf)
    last_ten, best_ten, noise = _windows(losses)
    batches_rose = last_ten > FACTOR * best_ten + noise + ROUNDING * first
    whole_rose = end > FACTOR * best + ROUNDING * first
    return Verdict(
        nan=nan,
        doubled=_doubled(evaluations),
        rose=(batches_rose and whole_rose) or (end >= 2.0 * best and end > FLOOR * first),
        batches_rose=batches_rose,
        whole_rose=whole_rose,
        last_ten=last_ten,
        best_ten=best_ten,
        noise=noise,
    )


def _doubled(evaluations: Sequence[Evaluation]) -> bool:
    floor = FLOOR * evaluations[0].train
    return any(
        after.step > WINDOW and after.train >= 2.0 * before.train and after.train > floor
        for before, after in pairwise(evaluations)
    )


def _windows(losses: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the last ten, smallest mean of ten consecutive, and the noise of comparing them; zeros without ten."""
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    if len(finite) < WINDOW:
        return 0.0, 0.0, 0.0
    windows = np.lib.stride_tricks.sliding_window_view(finite, WINDOW)
    means = windows.mean(1)
    at = int(means.argmin())
    errors = windows[[-1, at]].std(1, ddof=1) / WINDOW**0.5
    noise = ERRORS * math.hypot(errors[0], FACTOR * errors[1])
    return float(means[-1]), float(means[at]), noise
