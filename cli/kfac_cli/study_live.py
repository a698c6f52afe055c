"""What people see of a study while it goes on: a table on a terminal, plain lines elsewhere; on stderr.

Imports rich only when something is shown, and no torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kfac_cli.live import counted, duration, figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

__all__ = ["StudyLive", "counts_text"]

_PLAIN_SECONDS = 30.0
"""Seconds between two lines about one run where there is no terminal."""

_STATES = ("done", "running", "pending", "failed", "diverged")
_STYLES = {"done": "green", "running": "cyan", "pending": "dim", "failed": "red", "diverged": "red"}


def counts_text(counts: Mapping[str, Any]) -> str:
    """``"3 done, 1 running, 8 pending"``; states without runs are left out."""
    return ", ".join(f"{counts[state]} {state}" for state in _STATES if counts.get(state))


class StudyLive:
    """A listener of a study.

    On a terminal one table is redrawn in place: a line a variant with the number of runs in each state, and a line a
    run under way. What has ended badly stays above it at once, with its reason.
    """

    def __init__(self) -> None:
        from rich.console import Console

        terminal = sys.stderr.isatty()
        self.console: Console = Console(stderr=True, highlight=False, soft_wrap=not terminal)
        self._live: Live | None = None
        self._counts: Mapping[str, Any] = {}
        self._under_way: dict[str, Mapping[str, Any]] = {}
        self._variants: dict[str, dict[str, int]] = {}
        self._printed: dict[str, float] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(
                console=self.console, refresh_per_second=4, transient=True, get_renderable=self._table, screen=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if "done" in event and "pending" in event:
            self._counts = event
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, style=style)

    def _on_study(self, event: Mapping[str, Any]) -> None:
        self.say(f"study {event['name']}: {counted(event['total'], 'run')}, {counts_text(event) or 'none'}")

    def _on_started(self, event: Mapping[str, Any]) -> None:
        self._under_way[event["run"]] = event
        self._printed[event["run"]] = time.monotonic()
        if self._live is None:
            self.say(f"started {_name(event)}")

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        self._under_way[event["run"]] = event
        now = time.monotonic()
        if self._live is None and now - self._printed.get(event["run"], now) >= _PLAIN_SECONDS:
            self._printed[event["run"]] = now
            self.say(f"{_name(event)}: {_progress(event)}")

    def _on_ended(self, event: Mapping[str, Any]) -> None:
        self._under_way.pop(event["run"], None)
        if not event["tuning"]:
            counts = self._variants.setdefault(event["variant"], {})
            counts[event["state"]] = counts.get(event["state"], 0) + 1
        what = "tuning run " if event["tuning"] else ""
        if event["state"] == "done":
            if self._live is None:
                self.say(f"done {what}{_name(event)}")
        else:
            self.say(f"{event['state']} {what}{_name(event)}: {event['reason']}", _STYLES[event["state"]])

    def _on_tuned(self, event: Mapping[str, Any]) -> None:
        where = f"{event['variant']} on {event['problem']}"
        if event["chosen"] is None:
            self.say(f"no tuning run of {where} succeeded; it has no runs", "red")
        else:
            self.say(f"tuned {where}: {_flat(event['chosen'])}")

    def _on_stopping(self, event: Mapping[str, Any]) -> None:
        many = event["under_way"]
        finish = "finishes its step and is saved" if many == 1 else "finish their step and are saved"
        self.say(f"stopping: {counted(many, 'run')} {finish}")

    def _table(self) -> Table:
        from rich.table import Table

        passed = duration(time.monotonic() - self._began)
        table = Table(title=f"{counts_text(self._counts) or 'starting'}, {passed}", title_justify="left", box=None)
        for name in ("variant", "problem", "seed", "progress"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for event in self._under_way.values():
            table.add_row(event["variant"], event["problem"], str(event["seed"]), _progress(event), style="cyan")
        for variant, counts in self._variants.items():
            table.add_row(variant, "", "", counts_text(counts))
        return table


def _name(event: Mapping[str, Any]) -> str:
    return f"{event['variant']} ({event['problem']}, seed {event['seed']}, {event['run']})"


def _progress(event: Mapping[str, Any]) -> str:
    if event.get("step") is None:
        return "starting"
    steps = event["steps"]
    of = f"/{steps}" if steps < 1_000_000_000 else ""
    return f"step {event['step']}{of}, error {figure(event['error'])}, {duration(event['seconds'] or 0.0)}"


def _flat(table: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in table.items():
        parts.append(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"{prefix}{key} = {value}")
    return ", ".join(parts)
