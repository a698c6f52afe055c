r"""Steps that raise the objective are shortened or undone.

Two questions are asked. The first one after a step, on its own mini-batch: is h(theta + delta) <= h(theta)? Where the
quadratic model holds the answer is yes, so a no says that the step left the region in which it does; a Levenberg-
Marquardt method would not take it either (More 1978; Nocedal & Wright 2006, algorithm 4.1), where the paper's takes all
steps. The second one before the next step, on its mini-batch, whose h is known anyway: a value far above the last ones
makes the step before doubtful, and one forward pass without that step tells whether it did the harm or the mini-batch
is a hard one. Either way the step goes, the previous step is forgotten, and lambda rises.

Every step is asked about while it is new: at the start, and after a step undone. Later the steps that adapt lambda are,
which compute h anyway, and bold ones, which promise to take away most of h. A bold step has left the region in which
the model holds unless it keeps a fair part of its promise: a mini-batch of few cases may gain a little by a step that
takes the rest of the data to several times its loss. So it goes where rho < 1/4, although h fell.

A step of its own mini-batch's no is not gone yet: its direction may be right, and the optimizer tries the minimum of
the parabola through h before, its slope and h after, as line searches do (Nocedal & Wright, section 3.5), unless that
is less than `Undo.shortest` of its length, where the point that the parabola goes through is too far away.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kfac_plugins.trust import UndoConfig
from kfacore.roles.trust import Trust

__all__ = ["Undo"]

_WINDOW = 10
"""Mini-batches whose mean objective a new one is compared with."""

_KEPT = 0.25
"""Share of its promise that a bold step must keep: below it the Levenberg-Marquardt rule finds the model bad, too."""

_FEWEST = 3
"""So many must be known before anything is doubtful."""


class Undo(Trust):
    """Accepts what does not raise h beyond rounding."""

    Config = UndoConfig
    config: UndoConfig

    shortest = 0.1

    def __init__(self, config: UndoConfig | None = None) -> None:
        super().__init__(config)
        self._undone = 0  # the last step undone; the start counts as one
        self._recent: list[float] = []

    def asks(self, step: int) -> bool:
        """While the step is new."""
        return step <= self._undone + self.config.settling

    def wonders(self, objective: float, predicted: float) -> bool:
        """If the step would take away more than a share of h, which no model of second order knows so far away."""
        return not -predicted <= self.config.bold * abs(objective)

    def attempts(self, step: int) -> int:
        """Several at the very start, where lambda is only a guess."""
        return self.config.attempts if step == 1 else 1

    def accepts(self, before: Tensor, change: Tensor) -> Tensor:
        """change <= 0 up to rounding of a mean over float32 losses."""
        return change <= 1e-6 * before.abs()

    def believes(self, before: Tensor, change: Tensor, predicted: Tensor) -> Tensor:
        """Of a bold step a quarter of what it promised: what is left of it beyond its own mini-batch is harm."""
        bold = -predicted > self.config.bold * before.abs()
        return ~bold | (change <= _KEPT * predicted)

    @property
    def looks_back(self) -> bool:
        """Yes."""
        return True

    @property
    def every_step(self) -> bool:
        """As configured."""
        return self.config.every_step

    def doubts(self, objective: float) -> bool:
        """Far above the mean of the last ones, or not a number."""
        if len(self._recent) < _FEWEST:
            return not math.isfinite(objective)
        return not objective <= self.config.doubt * sum(self._recent) / len(self._recent)

    def disowns(self, now: float, earlier: float) -> bool:
        """Much better without the step."""
        return math.isfinite(earlier) and not now <= self.config.worse * earlier

    def judged(self, step: int, accepted: bool) -> None:
        """A step undone makes the following ones new."""
        if not accepted:
            self._undone = step

    def saw(self, objective: float) -> None:
        """Remember the last ones."""
        if math.isfinite(objective):
            self._recent = [*self._recent[1 - _WINDOW :], objective]

    def state_dict(self) -> dict[str, Any]:
        """The last step undone and the last objectives."""
        return {"undone": self._undone, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up both."""
        self._undone, self._recent = int(state["undone"]), [float(value) for value in state["recent"]]
