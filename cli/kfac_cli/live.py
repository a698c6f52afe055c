"""What people see of a run while it goes on: a live line on a terminal, an occasional plain one elsewhere; on stderr.

Imports rich only when something is shown, and no torch.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

__all__ = ["LiveLine", "counted", "duration", "figure", "fitted", "pace", "step_parts"]

_NAMES = {"lam": "lambda"}
_DIGITS = {"loss": 4, "error": 4}

_LEAST = ("gamma", "mu", "alpha", "rho", "lambda", "ms/step", "s/step", "error", "undone", "ETA")
"""Words of the parts of a step that give way on a narrow terminal, in this order."""

_PLAIN_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


def figure(value: object, digits: int = 4) -> str:
    """A number in few characters; ``-`` where there is none."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}g}"


def counted(number: int, noun: str) -> str:
    """A number and its noun: ``1 step``, ``2 steps``, ``20,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """``42s``, ``3m05s`` or ``2h07m``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def pace(seconds: float) -> str:
    """``832 ms/step``, or ``1.07 s/step`` from a second on."""
    return f"{figure(seconds, 3)} s/step" if round(1e3 * seconds) >= 1000 else f"{figure(1e3 * seconds, 3)} ms/step"


def step_parts(
    event: Mapping[str, Any], steps: int, seconds: float, remaining: float, rho: object, rejected: int = 0
) -> list[str]:
    """One step in a few words each; numbers that the optimizer does not have are left out.

    Args:
        event: The step event.
        steps: Steps in all.
        seconds: Recent time of a step.
        remaining: Seconds to go, evaluations not counted.
        rho: The last reduction ratio, which is not computed in every step.
        rejected: Steps that were undone so far.
    """
    numbers = {name: event.get(name) for name in ("loss", "error", "lam", "gamma", "rho", "alpha", "mu")}
    numbers["rho"] = rho
    return [
        f"step {event['step']}/{steps}",
        *(
            f"{_NAMES.get(name, name)} {figure(value, _DIGITS.get(name, 3))}"
            for name, value in numbers.items()
            if value is not None
        ),
        *([f"{rejected} undone"] if rejected else []),
        pace(seconds),
        f"ETA {duration(remaining)}",
    ]


class LiveLine:
    """A listener of a run that shows its events to people.

    On a terminal the current step is redrawn in place, and evaluations stay above it; elsewhere a line is printed for
    each evaluation, and for a step every ten seconds. Warnings of the library appear among them.
    """

    def __init__(self) -> None:
        from rich.console import Console

        # Colours and redrawing are for terminals; the width must not break the plain lines of a log file.
        terminal = sys.stderr.isatty()
        self.console: Console = Console(stderr=True, highlight=False, soft_wrap=not terminal)
        self._live: Live | None = None
        self._steps = 0
        self._rho: object = None
        self._rejected = 0
        self._recent: list[tuple[int, float]] = []
        self._printed = time.monotonic()
        self._handler = _ConsoleHandler(self.console)

    def __enter__(self) -> Self:
        logging.getLogger("kfacore").addHandler(self._handler)
        logging.getLogger("kfac_plugins").addHandler(self._handler)
        if self.console.is_terminal:
            from rich.live import Live

            waiting = "loading torch and the data ..."
            self._live = Live(waiting, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        logging.getLogger("kfacore").removeHandler(self._handler)
        logging.getLogger("kfac_plugins").removeHandler(self._handler)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        shows = {"start": self._on_start, "step": self._on_step, "eval": self._on_eval}
        show = shows.get(event["event"])
        if show is not None:
            show(event)

    def say(self, text: str) -> None:
        """Print a line that stays. The terminal wraps it, not rich, so that paths and commands can be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    def _on_start(self, event: Mapping[str, Any]) -> None:
        self._steps = int(event["steps"])
        method = event["optimizer"] if event["approx"] is None else f"{event['optimizer']}/{event['approx']}"
        test = f"{event['train_cases']:,} + {event['test_cases']:,} test examples"
        cases = test if event["test_cases"] else counted(event["train_cases"], "example")
        self._words(
            f"{event['problem']} with {method}: {counted(event['parameters'], 'parameter')}, {cases}, "
            f"{event['dtype']} on {event['device']}"
        )
        going_on = f", continued after step {event['step']}" if event["step"] else ""
        self.say(f"run folder {event['run']}{going_on}")
        self._recent = [(int(event["step"]), float(event["seconds"]))]
        self._rejected = int(event.get("rejected", 0))
        if self._live is not None:
            self._live.update(f"waiting for step {event['step'] + 1} ...")

    def _on_step(self, event: Mapping[str, Any]) -> None:
        step, seconds = int(event["step"]), float(event["seconds"])
        self._recent = [*self._recent[-20:], (step, seconds)]  # a whole cycle of refreshes
        (first, before), (last, now) = self._recent[0], self._recent[-1]
        each = (now - before) / max(last - first, 1)
        if event.get("rho") is not None:
            self._rho = event["rho"]
        self._rejected += bool(event.get("rejected"))
        parts = step_parts(event, self._steps, each, each * (self._steps - step), self._rho, self._rejected)
        if self._live is not None:
            self._live.update(_Fitted(parts))
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.say("  ".join(parts))

    def _on_eval(self, event: Mapping[str, Any]) -> None:
        parts = [f"step {event['step']}"]
        for name, prefix in (("", ""), ("averaged ", "averaged_")):
            numbers = [
                f"{part} {figure(event[f'{prefix}{part}_error'])}"
                for part in ("train", "test")
                if event.get(f"{prefix}{part}_error") is not None
            ]
            if numbers:
                parts.append(f"{name}error: {', '.join(numbers)}")
        self._words("  ".join(parts))

    def _words(self, text: str) -> None:
        """Print a line of words, no path among them: rich may break it between them."""
        self.console.print(text, markup=False)


class _Fitted:
    """The parts of a step in one line of the terminal as wide as it is when drawn: what matters least gives way."""

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = list(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(fitted(self.parts, options.max_width), no_wrap=True, overflow="ellipsis")


def fitted(parts: Sequence[str], width: int) -> str:
    """The parts two spaces apart, without as many of them as do not fit.

    Args:
        parts: What `step_parts` returned.
        width: Columns.

    Returns:
        At most `width` characters unless the step alone is longer; the step and the loss are the last to go.
    """
    kept = list(parts)
    for name in _LEAST:
        if len("  ".join(kept)) <= width:
            break
        kept = [part for part in kept if name not in part.split()]
    while len(kept) > 1 and len("  ".join(kept)) > width:
        kept.pop()
    return "  ".join(kept)


class _ConsoleHandler(logging.Handler):
    """Prints log records above the live line."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self.console.print(f"{record.levelname.lower()}: {record.getMessage()}", markup=False, soft_wrap=True)
