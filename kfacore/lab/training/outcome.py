"""Whether a run got better: its first, best and last training loss, and what to try after one that fell apart.

Everything that judges a run (the loop, the summary, reports, studies) asks `verdict`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Losses", "Verdict", "remedy", "verdict"]

Verdict = Literal["fine", "diverged"]
"""What a run's losses come to."""

NOISE = 1e-3
"""Share of the first loss that counts as noise."""


def verdict(first: float | None, best: float | None, last: float | None) -> Verdict:
    """Whether a run fell apart, by its training losses over the whole training set.

    Diverged is a last loss that is not finite, is more than half above the first one, or is more than twice the best
    one; the last two by more than a thousandth of the first. A run of a few steps may well end a little above its
    start. With losses that may be negative, twice the best is best + |best|, likewise for the first.

    Args:
        first: The loss of the first evaluation, None if there was none.
        best: The smallest loss of all evaluations, None if none was finite.
        last: The loss of the last evaluation, None if there was none: nothing is known then, and nothing held against
            the run.
    """
    if last is None:
        return "fine"
    if not math.isfinite(last):
        return "diverged"
    start = first if first is not None and math.isfinite(first) else None
    floor = NOISE * abs(start if start is not None else best or 0.0)
    if start is not None and last > start + 0.5 * abs(start) + floor:
        return "diverged"
    return "diverged" if best is not None and last > best + abs(best) + floor else "fine"


@dataclass(frozen=True)
class Losses:
    """The training losses of a run that matter for its verdict.

    Attributes:
        first: The loss of the first evaluation.
        best: The smallest finite one.
        best_step: The step after which it was measured.
        last: The loss of the last evaluation; NaN or infinity if it was not finite.
        last_step: The step after which that was measured.
    """

    first: float | None = None
    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    last_step: int | None = None

    def after(self, step: int, loss: float) -> Losses:
        """With one more evaluation.

        Args:
            step: Steps taken.
            loss: The training loss found.
        """
        first = loss if self.first is None else self.first
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            return Losses(first, loss, step, loss, step)
        return Losses(first, self.best, self.best_step, loss, step)

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Losses:
        """Those of the events of a run; files have null for a loss that was not finite."""
        found = cls()
        for event in events:
            if event.get("event") == "eval":
                loss = event.get("train_loss")
                found = found.after(int(event["step"]), math.nan if loss is None else float(loss))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Losses:
        """Those that `as_dict` has written."""
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, float | int | None]:
        """The numbers by name."""
        return asdict(self)

    @property
    def verdict(self) -> Verdict:
        """What they come to."""
        return verdict(self.first, self.best, self.last)

    def __str__(self) -> str:
        """``first 2.303, best 0.0412 (step 150), last 0.0431``; a dash where nothing was measured."""
        where = "" if self.best_step is None else f" (step {self.best_step})"
        return f"first {_figure(self.first)}, best {_figure(self.best)}{where}, last {_figure(self.last)}"


def remedy(options: Mapping[str, Any], lambdas: Iterable[float | None], gamma: float | None = None) -> str:
    """What to try after a run that fell apart: one option as ``--set`` takes it.

    Ten times the largest lambda of those given: the one at the end is what the run fell apart with, and one that a run
    started with and has lowered since was too small as well. Without a lambda ten times gamma, or a tenth of the
    learning rate.

    Args:
        options: The run's configuration as a table.
        lambdas: lambda at the start and at the end, as far as they are known.
        gamma: gamma at the end, if it is known.

    Returns:
        For example ``"a larger damping, --set damping.lambda0=0.00015"``.
    """
    damping, optimizer = options.get("damping") or {}, options.get("optimizer") or {}
    largest = max((value for value in lambdas if value is not None and math.isfinite(value)), default=0.0)
    if "lambda0" in damping and largest > 0.0:
        return f"a larger damping, --set damping.lambda0={10.0 * largest:.2g}"
    if "gamma" in damping and gamma is not None and math.isfinite(gamma) and gamma > 0.0:
        return f"a larger damping, --set damping.gamma={10.0 * gamma:.2g}"
    rate = optimizer.get("lr")
    if isinstance(rate, float):
        return f"a smaller learning rate, --set optimizer.lr={rate / 10.0:.2g}"
    return "a stronger damping or a smaller learning rate"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
